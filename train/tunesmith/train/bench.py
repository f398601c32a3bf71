"""`tunesmith bench train`: how fast a recipe trains here, against the device's own ceiling.

Real steps of the real loop, on the recipe's model and rows or on random ones of a known shape.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.config import UserError, require
from tunesmith.config.schema import Recipe
from tunesmith.ledger import describe_environment
from tunesmith.ledger.store import Work
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table

_FIGURES_FILE = "bench.json"
_STEPS_OF_ROWS = 4
"""Random rows are drawn for so many steps, then seen again: their content changes no speed."""


@dataclass(frozen=True)
class Workload:
    """What the measurement adds to the recipe."""

    shape: str | None = None
    """Random weights and rows in place of the recipe's, by a name in `shapes.SHAPES`."""

    length: int | None = None
    """Tokens of each random row; `data.max_length` when None."""

    steps: int = 10
    """Optimizer steps of one round."""

    warmup_steps: int = 5
    """Steps before the first round, and before each of a peer's."""

    rounds: int = 3
    peer: str | None = None
    """Another program that trains in turns with Tunesmith; there is `trl`."""


def run(stages: Stages, **workload: Any) -> dict[str, Any]:
    """Measure, unless the same was measured on this machine before."""
    train = stages.recipe.train
    if train is None:
        raise UserError(f"{stages.path}: this needs a train section")
    work_to_do = Workload(**workload)
    _check(work_to_do, stages)
    for module in ("torch", "transformers"):
        require(module, "train")
    from tunesmith.train.model import quiet_libraries

    quiet_libraries()
    for module in ("accelerate", "peft"):
        require(module, "train")
    if train.method == "qlora" or "8bit" in train.optim:
        require("bitsandbytes", "train")
    from tunesmith.train.ranks import join, write_together

    accelerator = join()
    if work_to_do.peer and accelerator.num_processes > 1:
        raise UserError("--peer: a peer is compared on one device; start one process")
    draft = stages.bench_train(asdict(work_to_do))
    if stages.store.find(draft.id) is None:
        with write_together(stages, draft) as work:
            figures = _measure(stages, work_to_do, work, accelerator)
            if accelerator.is_main_process:
                report = {"schema_version": 1, "environment": describe_environment(), **figures}
                text = json.dumps(report, allow_nan=False, indent=1)
                (work.out / _FIGURES_FILE).write_text(text + "\n", encoding="utf-8")
            work.metrics |= {"mode": "train", **figures}
    found = stages.made(draft)
    return {"id": found.id, "path": str(found.folder), **found.manifest.metrics}


def show(result: dict[str, Any]) -> RenderableType:
    """The rates with their range over the rounds, and the peer's beside them."""
    peer = result["peer"]
    rows = [
        (name, _spread(result[key]), *([_spread(peer[key])] if peer else []))
        for name, key in _RATES.items()
    ]
    rows.append(
        (
            "peak memory, GiB",
            f"{result['peak_memory_gib']:.2f}",
            *([f"{peer['peak_memory_gib']:.2f}"] if peer else []),
        )
    )
    alone = [
        ("useful TFLOP/s", result["useful_tflops_per_s"], "{:,.2f}"),
        ("matrix product here, TFLOP/s", result["ceiling_tflops_per_s"], "{:,.2f}"),
        ("share of that", result["share_of_ceiling"], "{:.1%}"),
        ("MFU (share of the data sheet's peak)", result["mfu"], "{:.1%}"),
        ("loss of the last round, nats", result["final_loss"], "{:.4f}"),
        ("gradient norm", result["grad_norm"], "{:.4f}"),
        ("warm-up, s", result["warmup_s"], "{:,.1f}"),
    ]
    blank = [""] if peer else []
    rows += [
        (name, "–" if value is None else shape.format(value), *blank)
        for name, value, shape in alone
    ]
    columns = ["median (lowest – highest)", "tunesmith", *([peer["name"]] if peer else [])]
    parts: list[RenderableType] = [make_table(f"bench train · {result['id']}", columns, rows)]
    if peer:
        parts.append(
            Text(
                f"tunesmith is {_spread(peer['speed_ratio'], '{:.2f}')} times as fast, with "
                f"{peer['memory_ratio']:.2f} times the memory"
            )
        )
    return Group(*parts, Text(result["path"], style="dim"))


_RATES = {"supervised tokens/s": "supervised_tokens_per_s", "tokens/s": "tokens_per_s"}


def _check(workload: Workload, stages: Stages) -> None:
    if workload.peer not in (None, "trl"):
        raise UserError(f"--peer {workload.peer}: there is trl")
    if workload.length and not workload.shape:
        raise UserError("--length is of random rows, which --shape asks for")
    for name in ("steps", "warmup_steps", "rounds"):
        if getattr(workload, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: at least 1")
    train = stages.recipe.train
    assert train
    if workload.shape and train.method == "pretrain":
        raise UserError("--shape: train.architecture is the shape of a model to pre-train")
    if workload.peer:
        from tunesmith.train.peer import trl_lora

        trl_lora(train)


def _measure(stages: Stages, workload: Workload, work: Work, accelerator: Any) -> dict[str, Any]:
    from tunesmith.train import flops
    from tunesmith.train.measure import Meter, Round

    started_s = time.perf_counter()
    job, peer_job = _prepare(stages, workload, work, accelerator)
    load_s = time.perf_counter() - started_s
    ceiling = flops.matmul_tflops(job.dtype, accelerator.device)
    peak = flops.peak_tflops(job.dtype, accelerator.device)
    run_peer = _peer(stages, peer_job) if peer_job else None
    meter = Meter(job, accelerator)
    log(f"bench train: {workload.warmup_steps} steps of warm-up")
    warmup_s = meter.warm_up(workload.warmup_steps)
    ours: list[Round] = []
    theirs: list[dict[str, Any]] = []
    for at in range(workload.rounds):
        ours.append(meter.round(workload.steps))
        tokens_per_s = ours[-1].tokens / ours[-1].seconds
        log(f"bench train: round {at + 1}/{workload.rounds}: {tokens_per_s:,.0f} tokens/s")
        if run_peer:
            meter.leave_memory()
            theirs.append(run_peer())
    figures = _rates([asdict(one) for one in ours])
    useful = [one.useful_flops / one.seconds / 1e12 for one in ours if one.useful_flops is not None]
    # All ranks share the work, so each has its part of the useful operations.
    rate = statistics.median(useful) / accelerator.num_processes if useful else None
    figures |= {
        "useful_tflops_per_s": rate,
        "ceiling_tflops_per_s": ceiling,
        "share_of_ceiling": rate / ceiling if rate else None,
        "mfu": rate / peak if rate and peak else None,
        "peak_memory_gib": meter.peak_memory_gib,
        "final_loss": ours[-1].loss,
        "grad_norm": ours[-1].grad_norm,
        "load_s": load_s,
        "warmup_s": warmup_s,
        "rounds": [asdict(one) for one in ours],
    }
    return figures | {"peer": _beside(figures, theirs) if theirs else None}


def _prepare(
    stages: Stages, workload: Workload, work: Work, accelerator: Any
) -> tuple[Any, dict[str, Any] | None]:
    """The loop's job on the recipe's model and rows or on random ones, and a peer's job."""
    from tunesmith.data import make_dataset
    from tunesmith.train import peer
    from tunesmith.train.loop import Job
    from tunesmith.train.loss import TokenLoss
    from tunesmith.train.ranks import main_first
    from tunesmith.train.ready import choose_layout
    from tunesmith.train.stage import make_base, prepare

    recipe = stages.recipe
    assert recipe.train and recipe.data
    steps = workload.warmup_steps + workload.rounds * workload.steps
    settings = recipe.train.model_copy(update={"max_steps": steps})
    base_folder: Path | None
    if workload.shape:
        base_folder = work.scratch / "shape"
        model, dtype, rows = _random(recipe, workload, accelerator, base_folder)
    else:
        dataset = main_first(lambda: make_dataset(stages))
        base = None if settings.method == "pretrain" else make_base(stages, accelerator)
        parts = prepare(recipe, dataset, base, accelerator)
        model, dtype, rows = parts.model, parts.dtype, parts.train
        base_folder = base.root if base else None
    loss = TokenLoss(model, dtype)
    layout = choose_layout(recipe, rows.rows, loss, accelerator)
    job = Job(loss, rows, rows, layout, settings, dtype, recipe.seed, work.scratch)
    if not workload.peer:
        return job, None
    if base_folder is None:
        raise UserError("--peer trl: cannot pre-train from nothing; use another method")
    path = work.scratch / "rows.jsonl"
    peer.write_rows(rows.rows, path)
    longest = int(rows.lengths().max())
    precision = "float32" if settings.method == "full" else recipe.model.dtype
    arguments = peer.trl_arguments(settings, longest, recipe.seed, work.scratch / "trl")
    timed_steps = workload.warmup_steps + workload.steps
    arguments |= {"max_steps": timed_steps, "bf16": recipe.model.dtype == "bfloat16"}
    if not workload.shape:
        arguments["model_init_kwargs"] = {"dtype": precision}
    return job, {
        "base": str(base_folder),
        "random_dtype": precision if workload.shape else None,
        "rows": str(path),
        "lora": peer.trl_lora(settings),
        "arguments": arguments,
        "timed": [workload.warmup_steps, workload.steps],
    }


def _random(recipe: Recipe, workload: Workload, accelerator: Any, folder: Path) -> Any:
    """A random model of the shape, made ready as a real one is, its dtype, and random rows."""
    import torch

    from tunesmith.train import model as models
    from tunesmith.train import shapes
    from tunesmith.train.ready import check_precision, make_ready

    train, data = recipe.train, recipe.data
    assert workload.shape and train and data
    check_precision(train, accelerator.device)
    length = workload.length or data.max_length
    config = shapes.shape_config(workload.shape, length)
    shapes.save_empty(config, folder)
    dtype = models.torch_dtype(recipe.model.dtype, accelerator.device)
    torch.manual_seed(recipe.seed)
    weights = torch.float32 if train.method == "full" or train.lora.changes_base else dtype
    nf4 = train.method == "qlora"
    model = shapes.random_model(config, weights, accelerator.device, nf4=nf4)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    count = per_step * accelerator.num_processes * _STEPS_OF_ROWS
    rows = shapes.random_rows(count, length, config.vocab_size, recipe.seed)
    return make_ready(model, train, folder), dtype, rows


def _peer(stages: Stages, job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from tunesmith.train.peer import find_trl, run_trl

    environment = find_trl(stages.store.folder / "peers")

    def run_once() -> dict[str, Any]:
        found = run_trl(job, environment)
        log(f"bench train: trl: {found['tokens'] / found['seconds']:,.0f} tokens/s")
        return found

    return run_once


def _rates(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{name}_per_s": _summary([one[name] / one["seconds"] for one in rounds])
        for name in ("supervised_tokens", "tokens")
    }


def _beside(ours: Mapping[str, Any], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The peer's figures, and our speed over the peer's round by round."""
    memory_gib = max(one["peak_memory_gib"] for one in theirs)
    key = "supervised_tokens"
    ratios = [
        (our[key] / our["seconds"]) / (their[key] / their["seconds"])
        for our, their in zip(ours["rounds"], theirs, strict=True)
    ]
    return {
        "name": "trl",
        **_rates(theirs),
        "peak_memory_gib": memory_gib,
        "speed_ratio": _summary(ratios),
        "memory_ratio": ours["peak_memory_gib"] / memory_gib,
        "rounds": theirs,
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _spread(found: Mapping[str, float], shape: str = "{:,.0f}") -> str:
    low, high = shape.format(found["lowest"]), shape.format(found["highest"])
    return f"{shape.format(found['median'])} ({low} – {high})"
