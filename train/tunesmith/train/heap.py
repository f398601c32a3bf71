"""How far the C library's heap grows while blocks of tensors come and go.

glibc keeps freed blocks for later ones, and small blocks of the training's own objects, made in
between, break them up: a training on a CPU holds up to twice what its tensors need. No formula says
how much, so the blocks are really taken, in the order in which the simulated training makes its
tensors and among the same small objects. Nobody touches them, so they take no memory.
"""

from __future__ import annotations

import ctypes

_ALIGNMENT = 64
"""What torch asks for (c10/core/impl/alloc_cpu.cpp)."""

_LARGEST_KEPT_BYTES = 32 * 2**20 - 65536
"""Freeing a block of this size has glibc keep all up to it, as it does after loading a model
(DEFAULT_MMAP_THRESHOLD_MAX)."""

_COUNTED_BYTES = 2**18
"""The heap is measured after blocks of this size or more."""


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Heap:
    """Untouched blocks on this process's heap."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.mallinfo2.restype = _MallocInfo
        library.free.argtypes = [ctypes.c_void_p]
        library.posix_memalign.argtypes = [
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t,
        ]  # fmt: skip
        self._blocks: dict[int, int] = {}
        self.drop_all()
        self.take(0, _LARGEST_KEPT_BYTES)
        self.give_back(0)
        self._start = self._size()
        self.growth = 0
        """Bytes by which the heap has been larger than in the beginning, at most."""

    @classmethod
    def find(cls) -> Heap | None:
        """The heap of this process; None where the C library is not glibc 2.33 or later."""
        library = ctypes.CDLL(None)
        return cls(library) if hasattr(library, "mallinfo2") else None

    def take(self, key: int, size: int) -> None:
        """A block; none, without a word, where the system refuses one of such a size."""
        address = ctypes.c_void_p()
        if self._library.posix_memalign(ctypes.byref(address), _ALIGNMENT, size) == 0:
            self._blocks[key] = address.value or 0
        if size >= _COUNTED_BYTES and key:
            self.growth = max(self.growth, self._size() - self._start)

    def give_back(self, key: int) -> None:
        """Free a block."""
        if (address := self._blocks.pop(key, None)) is not None:
            self._library.free(address)

    def drop_all(self) -> None:
        """Free all blocks and return the heap's free pages to the system."""
        for key in list(self._blocks):
            self.give_back(key)
        self._library.malloc_trim(0)

    def _size(self) -> int:
        found = self._library.mallinfo2()
        return int(found.arena + found.hblkhd)
