"""Compressed checkpoints: schemes, calibration on the recipe's own conversations, verification."""

from tunesmith.quantize.schemes import SCHEMES, Scheme

__all__ = ["SCHEMES", "Scheme"]
