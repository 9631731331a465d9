"""The search-space language and the shipped sweeps."""
