"""What this device can do at most: memory bandwidth and matrix products, measured with torch.

`python -m tunesmith.bench.ceiling` prints both as JSON; it runs before the engine does, in a
process of its own, so that nothing of it stays in the memory that the engine wants.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_TIMEOUT_S = 120.0
_LEAST_S = 0.3
_CPU_MIB, _GPU_MIB = 256, 2048  # far beyond any cache
_CPU_EDGE, _GPU_EDGE = 1024, 8192


@dataclass(frozen=True)
class Ceiling:
    """The measured best of one device."""

    memory_gb_per_s: float
    """Bytes read and written while copying, 1e9 per second."""
    matmul_tflops: float
    """Of a bfloat16 matrix product."""


def measure_ceiling() -> Ceiling | None:
    """In a process of its own; None where torch cannot be imported there."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith.bench.ceiling"],
            capture_output=True, text=True, check=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
        return Ceiling(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def _measure() -> Ceiling:
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    source = torch.ones((_GPU_MIB if gpu else _CPU_MIB) * 2**18, device=device)
    target = torch.empty_like(source)
    edge = _GPU_EDGE if gpu else _CPU_EDGE
    left, right = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    copy_s = _best_s(lambda: target.copy_(source), wait)
    multiply_s = _best_s(lambda: left @ right, wait)
    return Ceiling(
        memory_gb_per_s=2 * source.nbytes / copy_s / 1e9,
        matmul_tflops=2 * edge**3 / multiply_s / 1e12,
    )


def _best_s(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """The shortest of many: a ceiling is what nothing disturbed."""
    times_s: list[float] = []
    work()
    wait()
    while sum(times_s) < _LEAST_S or len(times_s) < 3:
        started_s = time.perf_counter()
        work()
        wait()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure())))
