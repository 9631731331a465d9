"""The `halora` command, the one place that knows every part."""
