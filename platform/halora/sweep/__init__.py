"""Sweeps: what they try next, how they run, where, and how they are simulated."""
