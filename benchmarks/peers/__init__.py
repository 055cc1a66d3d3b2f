"""`make bench`: opdkit beside TRL, Liger and plain transformers. `bench.py` drives; the rest is what it measures."""
