"""Train CLIP models bootstrapped from EVA, score them zero-shot, and hand on their encoders."""

__version__ = "0.1.0"
