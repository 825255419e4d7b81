"""Families of runs for scaling experiments: what to run, and what came out."""
