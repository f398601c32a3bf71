"""Keeps the C library's heap small while a model trains on a CPU, at little loss of speed.

glibc keeps freed blocks for later ones, and small objects made in between keep free blocks from
growing together: a heap held up to 1.8 times what its tensors needed, and no formula says how much.
Giving free pages back makes it exact, but each page that comes again is cleared first, which can
take longer than the work on it. So they are given back only when the process is about to hold more
than its tensors ever needed together, and tensors are made of large pages, which are cleared
faster.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config.errors import ModelError
from tunesmith.train.region import decoder_layers

_LOOSE_SHARE = 0.08
"""Free pages that stay, as a share of the most that was ever needed. `tunesmith bench train` on the
tiny shape lost a tenth of its speed with 5 %, and no more than its rounds differ by with 8 %."""

_FEWEST_LOOSE_BYTES = 16 * 2**20

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def loose_bytes(needed_bytes: int) -> int:
    """The most free pages that a process which needs so much at its peak keeps on top of it."""
    return max(_FEWEST_LOOSE_BYTES, int(_LOOSE_SHARE * needed_bytes))


def use_large_pages() -> None:
    """Have torch make tensors of 2 MiB and more of large pages, where Linux has them.

    Torch reads THP_MEM_ALLOC_ENABLE once, when this process makes its first tensor; processes that
    are started later are left alone.
    """
    if _LARGE_PAGES in os.environ:
        return
    os.environ[_LARGE_PAGES] = "1"
    torch.empty(1)
    del os.environ[_LARGE_PAGES]


class Heap:
    """The heap of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.mallinfo2.restype = _MallocInfo
        self._least = self._beside_blocks()
        self._most_needed = 0

    @classmethod
    def find(cls) -> Heap | None:
        """None where the C library is not glibc 2.33 or later."""
        library = ctypes.CDLL(None)
        return cls(library) if hasattr(library, "mallinfo2") else None

    def tidy(self) -> None:
        """Give free pages back to the system if more is held than was ever needed."""
        held = _resident_bytes()
        if held <= self._allowed_bytes():
            return
        self._most_needed = max(self._most_needed, held - self._beside_blocks() + self._least)
        if held > self._allowed_bytes():
            self._library.malloc_trim(0)
            self._least = self._beside_blocks()

    def _allowed_bytes(self) -> int:
        return self._most_needed + loose_bytes(self._most_needed)

    def _beside_blocks(self) -> int:
        """Bytes that this process holds beside the blocks in use: code, mapped files and what is
        free on the heap."""
        found = self._library.mallinfo2()
        return _resident_bytes() - int(found.uordblks + found.hblkhd)


def keep_small(model: nn.Module) -> None:
    """Tidy the heap after the forward and before the backward pass of each layer, of its parts, and
    of the parts of these.

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
        inner = [part for block in layer.children() for part in block.children()]
        for part in (*inner, *layer.children(), layer):
            part.register_forward_hook(after_forward)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * _PAGE_BYTES
