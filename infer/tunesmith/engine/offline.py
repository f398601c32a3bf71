"""The engine inside this process, for work on a known set of prompts."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import warnings
from typing import Any

from tunesmith.engine.environment import (
    has_gpu_engine,
    offline_environment,
    thread_environment,
    usable_cores,
)
from tunesmith.engine.failures import start_failure
from tunesmith.engine.spec import EngineSpec, engine_arguments

# What the process had before an engine inside it changed that; what it starts later inherits it.
_own_environment: dict[str, str] = {}


def prepare_process() -> None:
    """Load torch with the environment that suits vLLM.

    `open_llm` does it too; a command that imports torch or transformers before that calls this
    first, else the model's threads are fewer and not bound to cores. Raises MissingExtraError
    without vLLM.
    """
    gpu = has_gpu_engine()
    os.environ.update(offline_environment())
    # It would overrule the recipe's `engine.kv_cache_gib`.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # Says that Triton is missing, which a CPU has no use for.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    if not gpu:
        _load_torch()


@functools.cache
def _load_torch() -> None:
    """With its threads on cores of their own, unless someone has said how many there shall be."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    if torch := sys.modules.get("torch"):
        # Too late to bind: unbound threads want a core to spare.
        torch.set_num_threads(max(1, len(usable_cores()) - 1))
        return
    keep, while_loading = thread_environment()
    os.environ.update(keep | while_loading)
    importlib.import_module("torch")
    for variable in while_loading:
        del os.environ[variable]


def open_llm(spec: EngineSpec, **engine_args: Any) -> Any:
    """Load a model: a `vllm.LLM`. Close it with `close_llm` before the next one is opened.

    `engine_args` go in place of those of the spec. Raises ModelError when vLLM refuses the
    model, TunesmithError when it fails on it.
    """
    arguments = engine_arguments(spec, gpu=has_gpu_engine()) | engine_args
    _own_cores()
    _own_environment.clear()
    _own_environment.update(os.environ)
    prepare_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from vllm import LLM

            return LLM(**arguments)
        except Exception as error:
            _give_back()
            text = f"{type(error).__name__}: {error}"
            raise start_failure(text, spec) from error


@functools.cache
def _own_cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def _give_back() -> None:
    os.sched_setaffinity(0, _own_cores())
    os.environ.update(_own_environment)
    for name in os.environ.keys() - _own_environment.keys():
        del os.environ[name]


def lora_request(spec: EngineSpec, name: str | None = None) -> Any:
    """What vLLM needs to apply one of the spec's `adapters`, or its own `adapter` when None.

    None where the whole model answers.
    """
    path = spec.adapters[name] if name else spec.adapter
    if path is None:
        return None
    from vllm.lora.request import LoRARequest

    # By folder: two names of one folder are one adapter to the engine and to its prefix cache.
    return LoRARequest(str(path), 1 + spec.all_adapters.index(path), str(path))


def close_llm(llm: Any) -> None:
    """Give back the memory, the process groups, the cores and the variables of an engine."""
    llm.llm_engine.engine_core.shutdown()
    parallel_state = sys.modules["vllm.distributed.parallel_state"]
    parallel_state.cleanup_dist_env_and_memory()
    _give_back()
