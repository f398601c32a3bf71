"""Several processes on one training: one of them writes, all of them wait for it.

Started by `accelerate launch` or `torchrun`; alone, every function here does the plain thing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from tunesmith.config.errors import UserError
from tunesmith.ledger import Draft
from tunesmith.ledger.store import Work
from tunesmith.pipeline.stages import Stages

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: the main one reads data and writes checkpoints alone."""

_RECIPE_DECIDES = {
    "ACCELERATE_USE_FSDP": "train.sharding",
    "ACCELERATE_USE_DEEPSPEED": "train.sharding",
    "ACCELERATE_USE_MEGATRON_LM": "train.sharding",
}


def join() -> Any:
    """An accelerator that knows the other processes, if there are any.

    Only the main process keeps its standard output, so that a result is printed once. Raises
    UserError when the launcher brings settings that the recipe has keys for.
    """
    for name, key in _RECIPE_DECIDES.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher sets {name}, but the recipe decides that: see {key}; leave it out "
                "of accelerate's configuration"
            )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
    return accelerator


def check_processes(accelerator: Any, wanted: int) -> None:
    """Raise UserError when a launcher started another number of processes than the recipe says."""
    if accelerator.num_processes != wanted:
        raise UserError(
            f"train.processes is {wanted}, and the launcher started {accelerator.num_processes}; "
            f"add train.processes={accelerator.num_processes}, or leave the launcher out"
        )


def main_first(make: Callable[[], T]) -> T:
    """Let the main process make something; the others then find it made."""
    with PartialState().main_process_first():
        return make()


@contextmanager
def write_together(stages: Stages, draft: Draft) -> Iterator[Work]:
    """The work folder of an artifact, on every rank; the main one finishes it."""
    state = PartialState()
    if state.num_processes == 1:
        with stages.store.write(draft, stages.recipe) as work:
            yield work
        return
    if state.is_main_process:
        with stages.store.write(draft, stages.recipe) as work:
            broadcast_object_list([work.out, work.scratch])
            yield work
    else:
        folders = broadcast_object_list([None, None])
        yield Work(draft, *folders)
    state.wait_for_everyone()
