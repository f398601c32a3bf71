"""Which cores or GPUs each copy of an engine gets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.config.errors import UserError
from tunesmith.engine.environment import has_gpu_engine, usable_cores
from tunesmith.ledger import gpu_names


@dataclass(frozen=True)
class Place:
    """Where one engine runs."""

    cores: tuple[int, ...] = ()
    """Processor cores; all when empty."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own, such as the GPUs it sees."""


def find_places(copies: int | None, devices_per_copy: int) -> list[Place]:
    """Places for so many copies; when None, for all that the GPUs have room for, one on a CPU.

    Raises UserError when there is no room for that many.
    """
    if not has_gpu_engine():
        cores, copies = usable_cores(), copies or 1
        if copies == 1:
            return [Place()]
        return [Place(tuple(cores[part])) for part in shares(len(cores), copies, 1, "cores")]
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = asked.split(",") if asked else [str(at) for at in range(len(gpu_names()))]
    if copies is None:
        copies = max(1, len(devices) // devices_per_copy)
    if copies == 1:
        return [Place()]
    return [
        Place(environment={"CUDA_VISIBLE_DEVICES": ",".join(devices[part])})
        for part in shares(len(devices), copies, devices_per_copy, "GPUs")
    ]


def shares(count: int, copies: int, at_least: int, name: str) -> list[slice]:
    """Divide so many cores or GPUs equally; what is left over stays idle."""
    size = count // copies
    if size < at_least:
        raise UserError(
            f"batch.replicas: {copies} engines need {copies * at_least} {name}, and there are "
            f"{count} for them; ask for fewer"
        )
    return [slice(at * size, (at + 1) * size) for at in range(copies)]
