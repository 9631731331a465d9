"""One chip description that drives noise, converters and energy; imports no ray."""
