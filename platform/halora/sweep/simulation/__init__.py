"""Sweeps over recorded results instead of training."""
