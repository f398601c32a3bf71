"""Whoever imports this has imported vLLM, with all that an engine needs, and started no thread."""

import importlib

from tunesmith.engine import prepare_process
from tunesmith.engine.environment import has_gpu_engine

prepare_process()
importlib.import_module("vllm").LLM  # noqa: B018 - vLLM imports its parts when they are named
if not has_gpu_engine():
    importlib.import_module("vllm.v1.worker.cpu_worker")
