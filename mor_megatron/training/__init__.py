"""One iteration: DeepSpeed's engine in each of its modes, the step, its learning rate, its metrics; an evaluation."""
