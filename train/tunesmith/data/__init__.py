"""Rows to learn from: sources, formats, checks and the split. Imports neither torch nor vLLM."""

from tunesmith.data.dataset import make_dataset, read_rows

__all__ = ["make_dataset", "read_rows"]
