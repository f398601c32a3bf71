"""What a recipe came to: one self-contained page, and the table that ends a run."""

from tunesmith.report.page import write_report
from tunesmith.report.table import summary

__all__ = ["summary", "write_report"]
