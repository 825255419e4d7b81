"""Checkpoints that are verified when read and resume in any layout."""
