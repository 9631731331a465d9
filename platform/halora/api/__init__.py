"""What `import halora` gives, and the command line is a client of."""
