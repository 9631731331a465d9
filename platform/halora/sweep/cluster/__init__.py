"""Where workers run: this machine, or a Ray cluster."""
