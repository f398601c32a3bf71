"""A model in an engine process of its own, asked over a pipe.

Parent and checkpoint are open at the same time, so that their rounds can alternate; each has its
memory to itself, and neither is lost with the other.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Concatenate, ParamSpec, TypeVar

from tunesmith.config import ModelError, TunesmithError
from tunesmith.engine import EngineSpec, close_llm, lora_request, open_llm
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.evaluate.fidelity.ask import process_bytes
from tunesmith.evaluate.measure import Engine
from tunesmith.pipeline.run import end_with_parent

_CLOSE_S = 30.0

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """An engine process. It loads its model when told to."""

    def __init__(self, spec: EngineSpec) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._name = spec.model.name
        self._process = context.Process(target=_work, args=(theirs, spec))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(_CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def load(self, **engine_args: Any) -> None:
        """Load the model. Raises ModelError when vLLM refuses it."""
        self._ask("load", engine_args)

    def call(
        self, function: Callable[Concatenate[Engine, P], R], *args: P.args, **named: P.kwargs
    ) -> R:
        """The result of `function(engine, …)` over there."""
        found: R = self._ask(function, (args, named))
        return found

    def _ask(self, what: Any, arguments: Any) -> Any:
        try:
            self._pipe.send((what, arguments))
            failed, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            raise TunesmithError(
                f"the engine of {self._name} ended with {self._process.exitcode}; it may have had "
                "too little memory"
            ) from error
        if failed:
            raise result
        return result


def _context() -> ForkServerContext | SpawnContext:
    """How engine processes are started. On a CPU they are forks of one that has imported vLLM,
    so that this is waited for once; on a GPU each imports it, because CUDA survives no fork."""
    if has_gpu_engine():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tunesmith.evaluate.fidelity.imported"])
    return context


def _work(pipe: Connection, spec: EngineSpec) -> None:
    """Answer until the pipe is closed."""
    end_with_parent()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions for engines of several GPUs
    engine = None
    # Not part of the time to load; an engine that cannot be imported is told of when it is opened.
    with contextlib.suppress(ImportError):
        importlib.import_module("tunesmith.evaluate.fidelity.imported")
    try:
        while True:
            what, arguments = pipe.recv()
            try:
                if what == "load":
                    engine, result = _load(spec, arguments), None
                else:
                    args, named = arguments
                    result = what(engine, *args, **named)
            except ModelError as error:
                pipe.send((True, ModelError(str(error))))
            except Exception as error:
                kind = "" if isinstance(error, TunesmithError) else f"{type(error).__name__}: "
                pipe.send((True, TunesmithError(f"{kind}{error}")))
            else:
                pipe.send((False, result))
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    if engine:
        close_llm(engine.llm)


def _load(spec: EngineSpec, engine_args: dict[str, Any]) -> Engine:
    started_s, before_bytes = time.monotonic(), process_bytes("VmRSS")
    llm = open_llm(spec, **engine_args)
    load_s = round(time.monotonic() - started_s, 3)
    added_bytes = process_bytes("VmRSS") - before_bytes
    return Engine(llm, lora_request(spec), spec.settings.max_num_seqs, load_s, added_bytes)
