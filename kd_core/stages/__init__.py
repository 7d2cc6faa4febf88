"""The stages of a recipe: the graph of what follows what, and the functions that compute its nodes."""
