"""Talk with finished models: a recipe's teacher and student, or a model in a directory."""
