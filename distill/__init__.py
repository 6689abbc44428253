"""Turns logged verdicts into a better draft: a torch-free worker and the trainer it execs."""
