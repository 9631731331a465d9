"""What a trial can be told: validated settings, below training and evaluation. Loads neither torch nor Ray."""
