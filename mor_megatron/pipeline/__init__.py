"""The pipeline: stages that pass rows on, and the ring in which recursions run."""
