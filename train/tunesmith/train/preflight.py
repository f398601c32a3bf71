"""What a preflight tries, and how a training is put back to where it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.config.errors import GateError
from tunesmith.train.batches import Rows
from tunesmith.train.checkpoint import random_state, set_random_state
from tunesmith.train.side import Side


def largest_passes(side: Side, steps: Iterable[Rows], per_pass: int) -> list[Rows]:
    """The rows of the pass with the most places for tokens and of that with the most learnt tokens,
    often the same; `steps` are groups."""
    shares = [
        rows
        for groups in steps
        for ranks in side.passes(groups, per_pass)
        for rows in ranks
        if len(rows)
    ]
    found = {max(range(len(shares)), key=lambda at: side.places(shares[at]))}
    found.add(max(range(len(shares)), key=lambda at: side.supervised(shares[at])))
    return [shares[at] for at in sorted(found)]


@contextmanager
def nothing_learnt(weights: list[Tensor], optimizer: Any, scaler: Any) -> Iterator[None]:
    """Put weights, optimizer, gradient scaler and random numbers back to where they are now, before
    the first step."""
    before = [_local(weight).detach().to("cpu", copy=True) for weight in weights]
    random, scale = random_state(), scaler.state_dict()
    yield
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            _local(weight).copy_(value)
    optimizer.zero_grad()
    optimizer.state.clear()
    if pages := getattr(getattr(optimizer, "optimizer", optimizer), "page_mng", None):
        pages.paged_tensors.clear()  # bitsandbytes holds on to the moments otherwise
    scaler.load_state_dict(scale)
    set_random_state(random)


@contextmanager
def within_memory() -> Iterator[None]:
    """Turn running out of memory into a GateError that says what would take less."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise GateError(
                "the training does not fit: its largest pass ran out of memory "
                f"({str(error).partition(chr(10))[0]}); halve train.per_device_train_batch_size "
                "and double train.gradient_accumulation_steps, or set "
                "train.gradient_checkpointing=true; `tunesmith plan` says how much each takes"
            ) from error
        raise


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
