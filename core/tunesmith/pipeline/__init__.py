"""From a recipe to its artifacts: which there are, which are missing, and making them in order."""

from tunesmith.pipeline.stages import Stages, builtin_recipe

__all__ = ["Stages", "builtin_recipe"]
