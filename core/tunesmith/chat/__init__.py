"""The chat template: one rendering for training, calibration, evaluation and serving."""

from tunesmith.chat.template import ChatTemplate, Supervised

__all__ = ["ChatTemplate", "Supervised"]
