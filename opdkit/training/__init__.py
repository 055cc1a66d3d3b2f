"""The trainer: `step.py` is the straight line, everything else serves it."""
