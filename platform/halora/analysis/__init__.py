"""The front and its figures: numbers in, numbers and figures out, no I/O."""
