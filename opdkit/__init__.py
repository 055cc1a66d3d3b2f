"""opdkit: post-train language models by on-policy distillation."""

__version__ = "0.1.0"
