"""Sampling and scoring. `base.py` says what an engine does; each other file wraps one engine."""
