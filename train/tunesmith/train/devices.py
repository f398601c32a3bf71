"""The devices a training can be planned for: this machine and known GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.config.errors import UserError
from tunesmith.train.useful import matmul_tflops, peak_of

THIS_MACHINE = "this"
_CEILING_SHARE = 0.8
"""Of the peak that large matrix products reach: 790 of 989 TFLOP/s, measured on an H200."""

_GPUS = {
    "a10": (23028, "A10"),
    "l4": (23034, "L4"),
    "a100-40": (40960, "A100"),
    "a100-80": (81920, "A100"),
    "l40s": (46068, "L40S"),
    "h100": (81559, "H100"),
    "h200": (143771, "H200"),
    "b200": (183359, "B200"),
}
"""Name → MiB as nvidia-smi reports them, and what the vendor calls it."""

_CUDA_RUNTIME_BYTES = 2**30
"""CUDA context, cuBLAS workspaces and what the caching allocator cannot use. Not measured."""

_CPU_WARMUP_BYTES = 96 * 2**20
"""What kernels add to a process when they first run: their code and their scratch memory; 20 to
100 MiB were seen."""


@dataclass(frozen=True)
class Device:
    """Where a training runs."""

    name: str
    type: str
    """`cpu` or `cuda`."""
    memory_bytes: int
    """What a training can have, its libraries included."""
    runtime_bytes: int
    """What the libraries take of it."""
    matmul_tflops: float | None
    """What large matrix products reach; None where this runs, and it can be measured."""

    def measured_tflops(self, dtype: str) -> float:
        """Speed of a matrix product; timed where this runs, in about a second."""
        if self.matmul_tflops is not None:
            return self.matmul_tflops
        return matmul_tflops(getattr(torch, dtype), torch.device(self.type))


def find_device(name: str = THIS_MACHINE, processes: int = 1) -> Device:
    """A known GPU by name, or what this process trains on; `processes` share a machine's memory.

    Raises UserError on another name.
    """
    if name in _GPUS:
        mib, model = _GPUS[name]
        ceiling = peak_of(model) * _CEILING_SHARE
        return Device(name, "cuda", mib * 2**20, _CUDA_RUNTIME_BYTES, ceiling)
    if name != THIS_MACHINE:
        raise UserError(f"no such device: {name}; there is {', '.join([THIS_MACHINE, *_GPUS])}")
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Device(torch.cuda.get_device_name(), "cuda", free, _CUDA_RUNTIME_BYTES, None)
    held = _resident_bytes()
    memory = _available_bytes() // processes + held
    return Device("this machine", "cpu", memory, held + _CPU_WARMUP_BYTES, None)


def larger_devices(needed_bytes: int) -> list[str]:
    """Known GPUs with so much memory, the smallest first."""
    return sorted(
        (name for name, (mib, _) in _GPUS.items() if mib * 2**20 >= needed_bytes),
        key=lambda name: _GPUS[name],
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far; on a CPU all of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    # ru_maxrss would begin with what the parent held when it started this process.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_gib(size: int) -> float:
    """Bytes as GiB."""
    return round(size / 2**30, 4)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    """Without swapping, within the limits of the control group."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    available = int(found["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
