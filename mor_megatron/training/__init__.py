"""From a model and batches to trained weights: schedule, optimizer, engine, step, loop, checkpoints, metrics."""
