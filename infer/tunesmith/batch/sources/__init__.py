"""Rows of an input as they were written, one at a time, whatever holds them."""

from tunesmith.batch.sources.record import Record
from tunesmith.batch.sources.records import read_records

__all__ = ["Record", "read_records"]
