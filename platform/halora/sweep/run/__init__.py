"""Runs a launched sweep: the Ray Tune adapter, its folder, progress, closing comparison."""
