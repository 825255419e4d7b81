"""What follows from the settings by arithmetic: parameters, FLOPs, bytes, stages; no process, no weights."""
