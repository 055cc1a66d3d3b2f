"""What recipes ask that cannot be, a file for each part that cannot do it; `whole.py` asks them all."""
