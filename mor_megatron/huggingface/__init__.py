"""Mixture-of-Recursions for transformers, and the way in and out of it."""
