"""Decides what to do next: the study, the samplers, rungs, races and budgets. Knows nothing of Ray."""
