"""How a CPU training gets its memory from the system."""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_THRESHOLD_BYTES = 2**19


def give_back_freed_tensors() -> None:
    """Have glibc map each tensor of 512 KiB or more by itself, in huge pages where there are some.

    By default it moves its threshold up to 32 MiB, and aligned blocks of that heap are seldom used
    again: the same training took 1.3 to 1.7 times the memory of its tensors, more with each step.
    Must be called before torch allocates. Does nothing under another C library, or where the
    environment sets the threshold.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
