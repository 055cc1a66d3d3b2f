"""How rows are put into passes of a model, and read."""
