"""Processes and their groups: start-up, CPU support, rows and gradients shared by ranks, detection of lost ranks."""
