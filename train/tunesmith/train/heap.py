"""Keeps the C library's heap small while a model trains on a CPU.

glibc keeps freed blocks for later ones, and small objects made in between keep free blocks from
growing together: by the end of a forward pass a heap held up to 1.8 times what its tensors needed,
and no formula says how much. Blocks that the system takes back as soon as they are freed
(M_MMAP_THRESHOLD) are exact, but each new one is cleared page by page, which takes longer than most
of the work on it. So free pages are given back only once there are many of them: what is held stays
near what is needed, and most blocks are used again as they are.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunesmith.config.errors import ModelError
from tunesmith.train.region import decoder_layers

_LOOSE_SHARE = 0.05
"""Free pages are given back from this share of what the process holds on."""

_FEWEST_LOOSE_BYTES = 16 * 2**20

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def loose_bytes(held_bytes: int) -> int:
    """The most free pages that a process holding so much keeps for later blocks."""
    return max(_FEWEST_LOOSE_BYTES, int(_LOOSE_SHARE * held_bytes))


class Heap:
    """The heap of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.mallinfo2.restype = _MallocInfo
        self._least = self._beside_blocks()

    @classmethod
    def find(cls) -> Heap | None:
        """None where the C library is not glibc 2.33 or later."""
        library = ctypes.CDLL(None)
        return cls(library) if hasattr(library, "mallinfo2") else None

    def tidy(self) -> None:
        """Give free pages back to the system if there are many."""
        held, beside = _resident_bytes(), self._beside_blocks()
        if beside - self._least > loose_bytes(held):
            self._library.malloc_trim(0)
            self._least = self._beside_blocks()

    def _beside_blocks(self) -> int:
        """Bytes that this process holds beside the blocks in use: code, mapped files and what is
        free on the heap."""
        found = self._library.mallinfo2()
        return _resident_bytes() - int(found.uordblks + found.hblkhd)


def keep_small(model: nn.Module) -> None:
    """Tidy the heap after each layer's forward and before its backward pass.

    Nothing happens where there is no such heap, or the layers of a model are not found.
    """
    heap = Heap.find()
    if heap is None:
        return
    tidy = heap.tidy

    def after_forward(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        tidy()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: tidy())

    try:
        layers = decoder_layers(model)
    except ModelError:
        return
    for layer in layers:
        layer.register_forward_hook(after_forward)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * _PAGE_BYTES
