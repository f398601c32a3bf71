"""Starts the processes of one training on this machine and ends as they do.

A launcher such as `torchrun` turns every end that is not a success into exit code 1; here a stop
that was asked for ends with the code that says: run it again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tunesmith.config import TunesmithError, UserError, WorkInterrupted, dump_recipe
from tunesmith.config.schema import Recipe
from tunesmith.pipeline.run import StepError, end_with_parent
from tunesmith.train.signals import stop_on_signals

_STOPPED = (WorkInterrupted.exit_code, -signal.SIGTERM, -signal.SIGINT)
"""Exit codes of a process that was stopped, in its training or before it could listen."""

_POLL_S = 0.2
_GRACE_S = 20.0
"""How long the others may live after one process has failed."""


def is_launched() -> bool:
    """Whether some launcher started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(recipe: Recipe) -> dict[str, Any]:
    """Train in `train.processes` processes; returns what the main one does.

    Raises WorkInterrupted after a stop that they heard of, and TunesmithError with the exit code
    of the first one that failed.
    """
    import torch

    assert recipe.train
    count, gpus = recipe.train.processes, torch.cuda.device_count()
    if gpus and count > gpus:
        raise UserError(
            f"train.processes: {count} need as many GPUs and this machine has {gpus}; lower it, or "
            "start the training on several machines with torchrun"
        )
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        arguments = ["train", str(folder / "recipe.yaml"), "--json"]
        with (folder / "result").open("wb") as out, (folder / "others").open("wb") as others:
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", "tunesmith.cli", *arguments],
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=others if rank else out,
                    stderr=others if rank else None,
                    preexec_fn=end_with_parent,
                )
                for rank, environment in enumerate(_environments(count))
            ]
            failed = _wait(ranks)
        if failed is None:
            result: dict[str, Any] = json.loads((folder / "result").read_text(encoding="utf-8"))
            return result
        code = ranks[failed].returncode
        if code in _STOPPED:
            raise WorkInterrupted("the training was stopped; run the same command again to resume")
        if failed:  # the main process has said why it failed on standard error
            sys.stderr.write((folder / "others").read_text("utf-8", "replace"))
    error = StepError(f"process {failed} of {count} ended with exit code {code}; see above")
    error.exit_code = code if code > 0 else TunesmithError.exit_code
    raise error


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that ended in another way than well, when all have ended."""
    failed: int | None = None
    deadline_s, asked = float("inf"), False
    try:
        with stop_on_signals() as stop:
            while any(rank.poll() is None for rank in ranks):
                if stop.requested and not asked:
                    asked = True
                    _signal(ranks, signal.SIGTERM)
                failed = _first_failure(ranks) if failed is None else failed
                if failed is not None and deadline_s == float("inf"):
                    deadline_s = time.monotonic() + _GRACE_S
                if time.monotonic() > deadline_s:
                    break
                time.sleep(_POLL_S)
    finally:
        _signal(ranks, signal.SIGKILL)
        for rank in ranks:
            rank.wait()
    return _first_failure(ranks) if failed is None else failed


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    return next((at for at, rank in enumerate(ranks) if rank.poll()), None)


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _environments(count: int) -> list[dict[str, str]]:
    """What torch.distributed reads, for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
        }
        for rank in range(count)
    ]
