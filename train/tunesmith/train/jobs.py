"""The jobs of a benchmark: the loop's and a peer's, on the same model and rows, real or random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.config import UserError
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.ledger.store import Work
from tunesmith.pipeline.stages import Stages
from tunesmith.train import model as models
from tunesmith.train import peer, shapes
from tunesmith.train.examples import Examples
from tunesmith.train.loop import Job
from tunesmith.train.loss import TokenLoss
from tunesmith.train.ranks import main_first
from tunesmith.train.ready import check_device, choose_layout, make_ready
from tunesmith.train.sharding import shard
from tunesmith.train.stage import make_trained_over, prepare
from tunesmith.train.workload import PROFILED_STEPS, Workload

_STEPS_OF_ROWS = 4
"""Random rows are drawn for so many steps, then seen again: their content changes no speed."""


def prepare_jobs(
    stages: Stages, workload: Workload, work: Work, accelerator: Any
) -> tuple[Job, dict[str, Any] | None]:
    """The loop's job, and the peer's where there is one: see `peer_trl.py` for what it has.

    Raises UserError for a training that the peer has nothing like.
    """
    recipe = stages.recipe
    assert recipe.train and recipe.data
    profiled_steps = PROFILED_STEPS if workload.profile else 0
    steps = workload.warmup_steps + workload.rounds * workload.steps + profiled_steps
    settings = recipe.train.model_copy(update={"max_steps": steps})
    base_folder: Path | None
    if workload.shape:
        base_folder = work.scratch / "shape"
        model, dtype, rows = _random(recipe, workload, accelerator, base_folder)
    else:
        dataset = main_first(lambda: make_dataset(stages))
        base = None if settings.method == "pretrain" else make_trained_over(stages, accelerator)
        parts = prepare(recipe, dataset, base, accelerator)
        model, dtype, rows = parts.model, parts.dtype, parts.train
        base_folder = base.root if base else None
    loss = TokenLoss(model, dtype)
    if settings.sharding == "full":
        shard(loss, accelerator)
    layout = choose_layout(recipe, rows.rows, loss, accelerator)
    job = Job(loss, rows, rows, layout, settings, dtype, recipe.seed, work.scratch)
    if not workload.peer:
        return job, None
    if base_folder is None:
        raise UserError("--peer trl: cannot pre-train from nothing; use another method")
    rows_path = work.scratch / "rows.jsonl"
    peer.write_rows(rows.rows, rows_path)
    precision = "float32" if settings.method == "full" else recipe.model.dtype
    arguments = {
        **peer.trl_arguments(settings, int(rows.lengths().max()), recipe.seed),
        "output_dir": str(work.scratch / "trl"),
        "max_steps": workload.warmup_steps + workload.steps,
        "bf16": recipe.model.dtype == "bfloat16",
        "model_init_kwargs": None if workload.shape else {"dtype": precision},
    }
    return job, {
        "base": str(base_folder),
        "random_dtype": precision if workload.shape else None,
        "rows": str(rows_path),
        "lora": peer.trl_lora(settings),
        "arguments": arguments,
        "timed": [workload.warmup_steps, workload.steps],
    }


def _random(
    recipe: Recipe, workload: Workload, accelerator: Any, folder: Path
) -> tuple[Any, torch.dtype, Examples]:
    """A random model of the shape, made ready as a real one is, its precision, and random rows."""
    train, data, device = recipe.train, recipe.data, accelerator.device
    assert workload.shape and train and data
    check_device(train, device)
    length = workload.length or data.max_length
    config = shapes.shape_config(workload.shape, length)
    shapes.save_empty(config, folder)
    dtype = models.torch_dtype(recipe.model.dtype, device)
    torch.manual_seed(recipe.seed)
    weights = torch.float32 if train.method == "full" or train.lora.changes_base else dtype
    model = shapes.random_model(config, weights, device, nf4=train.method == "qlora")
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    count = rows_per_step * accelerator.num_processes * _STEPS_OF_ROWS
    rows = shapes.random_rows(count, length, config.vocab_size, recipe.seed)
    return make_ready(model, train, folder), dtype, rows
