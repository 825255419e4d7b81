"""Checkpoints that prove themselves intact and resume in any layout."""
