"""Families of runs for scaling experiments: plans, training, fits and reports."""
