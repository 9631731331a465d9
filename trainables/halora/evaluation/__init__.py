"""Scoring on many chip instances, with intervals over rows and chips."""
