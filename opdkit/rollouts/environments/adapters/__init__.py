"""Environments of other libraries, each in one file. What they need is imported in the worker, and nowhere else."""
