"""The decision core, its Ray Tune adapter, and what launches and ends a sweep."""
