"""From a variant of the recipe to its eval artifact: one engine start each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.engine import EngineSpec, close_llm, engine_spec, lora_request, open_llm
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.engine.fit import refused_here
from tunesmith.evaluate.heldout import hold_out
from tunesmith.evaluate.measure import Engine, measure
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.pipeline.rows import sample_rows
from tunesmith.statistics import Rows, level
from tunesmith.terminal import log

_ROWS_FILE = "rows.jsonl"


def read_rows(artifact: Artifact) -> Rows:
    """The measured rows of an eval artifact."""
    lines = (artifact.root / _ROWS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def refused(stages: Stages, name: str) -> str | None:
    """Why the engine of this machine cannot run a variant; None when it can."""
    loaded = stages.made(stages.served_over(name) or stages.variants[name])
    return refused_here(loaded.root, stages.recipe.model.dtype, gpu=has_gpu_engine())


def measure_variant(stages: Stages, name: str) -> Artifact:
    """Load one model, measure it on the held-out rows, and keep every row."""
    recipe = stages.recipe
    section, data = recipe.evaluate, recipe.data
    assert section and data
    dataset = stages.made(stages.dataset)
    rows = sample_rows(dataset.root / "evaluation.jsonl", section.max_rows, recipe.seed)
    spec, draft = engine_spec(stages, name), stages.evaluation(name)
    with stages.store.write(draft, recipe) as work:
        log(f"evaluating {name}: starting the engine")
        with _loaded(spec) as engine:
            held_out = hold_out(
                rows,
                spec.model,
                chat_template=spec.chat_template,
                max_length=data.max_length,
                max_model_len=engine.llm.model_config.max_model_len,
                max_tokens=section.max_tokens,
                trust_remote_code=spec.trust_remote_code,
            )
            measured, seconds = measure(engine, held_out, section, name)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in measured)
        (work.out / _ROWS_FILE).write_text(text, encoding="utf-8")
        levels = {
            task: level(measured, task, section.confidence, recipe.seed) for task in section.tasks
        }
        work.metrics |= {
            "variant": name,
            "rows": len(measured),
            "excluded": dict(held_out.excluded),
            "cut": held_out.cut,
            "completion_tokens": sum(row["completion_tokens"] for row in measured),
            "seconds": {"load": engine.load_s, **seconds},
        }
        work.metrics |= {task: found.value if found else None for task, found in levels.items()}
    return stages.made(draft)


@contextmanager
def _loaded(spec: EngineSpec) -> Iterator[Engine]:
    """A model in the engine, gone again afterwards: the next one needs its memory."""
    started_s = time.monotonic()
    llm = open_llm(spec)
    try:
        load_s = round(time.monotonic() - started_s, 3)
        yield Engine(llm, lora_request(spec), spec.settings.max_num_seqs, load_s)
    finally:
        close_llm(llm)
