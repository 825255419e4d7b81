"""Mixture-of-Recursions models for transformers: the exported model, export and import."""
