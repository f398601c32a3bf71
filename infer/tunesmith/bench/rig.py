"""What every variant of a command is measured with, and one engine at a time to measure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tunesmith.bench.ceiling import Ceiling, measure_ceiling
from tunesmith.bench.client import open_session
from tunesmith.bench.energy import EnergyMeter, open_energy
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Meter, Target, open_meter
from tunesmith.bench.results import Machine
from tunesmith.bench.roofline import read_shape
from tunesmith.bench.traffic import Prompt, read_log, read_prompts, synthetic_prompts
from tunesmith.config import DataError, UserError
from tunesmith.config.schema.bench import Bench
from tunesmith.engine import EngineServer, EngineSpec
from tunesmith.ledger import Work, describe_environment, gpu_names
from tunesmith.pipeline import Stages
from tunesmith.terminal import log

T = TypeVar("T")


@dataclass(frozen=True)
class Rig:
    """The load of a recipe, and the instruments."""

    bench: Bench
    seed: int
    prompts: list[Prompt]
    generator: Generator
    energy: EnergyMeter
    ceiling: Ceiling | None
    hour_usd: float | None
    """Price of the devices that one engine holds."""

    def machine(self, spec: EngineSpec) -> Machine:
        """What a spec runs on."""
        return Machine(
            self.hour_usd, self.ceiling, read_shape(spec.model, spec.dtype, spec.adapter)
        )


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What was done with a server, and its time."""

    found: T
    load_s: float
    wall_s: float
    """From its start to its end."""
    engine_bytes: int | None
    """Memory that its processes held in the end; None where it is a GPU's."""


@contextlib.contextmanager
def open_rig(stages: Stages) -> Iterator[Rig]:
    """Read the prompts, see what the machine can do, and start the generator."""
    prompts = read_mix(stages)
    log("bench: measuring what this machine can do at most")
    ceiling = measure_ceiling()
    with Generator() as generator, open_energy(_devices(stages)) as energy:
        yield Rig(
            bench=bench_of(stages),
            seed=stages.recipe.seed,
            prompts=prompts,
            generator=generator,
            energy=energy,
            ceiling=ceiling,
            hour_usd=hour_usd(stages),
        )


def on_server(
    rig: Rig, name: str, spec: EngineSpec, log_path: Path, work: Callable[[Meter], Awaitable[T]]
) -> Measured[T]:
    """Start an engine, do something with it, and end it. Raises ModelError when it refuses."""
    started_s = time.perf_counter()
    log(f"bench {name}: starting the engine")
    with EngineServer(spec, log_path=log_path) as server:
        target, load_s = Target(name, server.url, spec.served_name), server.load_s
        found = asyncio.run(_with_meter(rig, target, work))
        held = None if gpu_names() else _group_bytes(server.pid)
    return Measured(found, load_s, time.perf_counter() - started_s, held)


async def _with_meter(rig: Rig, target: Target, work: Callable[[Meter], Awaitable[T]]) -> T:
    async with open_session() as session:
        tools = Instruments(session, rig.generator, rig.energy)
        return await work(await open_meter(target, rig.bench, rig.seed, tools, rig.prompts))


def bench_of(stages: Stages) -> Bench:
    """The recipe's section. Raises UserError when it has none."""
    if stages.recipe.bench is None:
        raise UserError(f"{stages.path}: this needs a bench section")
    return stages.recipe.bench


def read_mix(stages: Stages) -> list[Prompt]:
    """What `bench.prompts` says. Raises UserError when there is nothing to ask."""
    bench, seed = bench_of(stages), stages.recipe.seed
    if bench.prompts == "synthetic":
        return synthetic_prompts(bench, seed)
    if bench.prompts == "log":
        assert bench.log  # the schema asks for it
        return read_log(bench.log)
    if stages.recipe.data is None:
        raise UserError(
            f"{stages.path}: bench takes its prompts from held-out rows; add a data section, or "
            "bench.prompts: synthetic"
        )
    dataset = stages.made(stages.dataset)
    prompts = read_prompts(dataset.root / "evaluation.jsonl", seed)
    if not prompts:
        raise DataError(f"{dataset.root}/evaluation.jsonl has no prompt to send")
    return prompts


def hour_usd(stages: Stages) -> float | None:
    """Price of the devices that one engine holds."""
    price = stages.recipe.price
    return None if price is None else price.gpu_hour_usd * _devices(stages)


def write_bench(stages: Stages, work: Work, mode: str, **found: Any) -> None:
    """Leave `bench.json`: what was asked, on what, and what was found."""
    work.metrics["mode"] = mode
    head = {
        "schema_version": 2,
        "mode": mode,
        "bench": bench_of(stages).model_dump(mode="json"),
        "environment": describe_environment(),
    }
    write_json(work.out / "bench.json", head | found)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    partial.replace(path)


def _group_bytes(group: int | None) -> int | None:
    """Resident memory of a process group, shared pages once; None where it is unknown."""
    total_kib = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            after_name = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            if int(after_name.split()[2]) == group:
                rollup = status.with_name("smaps_rollup").read_text(encoding="utf-8")
                (pss,) = (line for line in rollup.splitlines() if line.startswith("Pss:"))
                total_kib += int(pss.split()[1])
    return 1024 * total_kib or None


def _devices(stages: Stages) -> int:
    return stages.recipe.engine.tensor_parallel_size if gpu_names() else 1
