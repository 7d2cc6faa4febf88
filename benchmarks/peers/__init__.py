"""How others store and read the same things; their own code where it is at hand."""
