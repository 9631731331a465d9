"""Pages to browse a store with."""
