"""Evaluation of trained models: likelihood of text, routing statistics, lm-eval tasks."""
