"""Quality of each model of a recipe, row by row, in the engine that serves it."""

from tunesmith.evaluate.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
