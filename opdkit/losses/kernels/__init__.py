"""The head's loss in Triton, used where it is proven equal."""
