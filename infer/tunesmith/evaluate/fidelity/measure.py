"""Parent and checkpoint side by side: from two engines to the metrics of a fidelity artifact."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.config import ModelError, TunesmithError
from tunesmith.config.schema.evaluate import Evaluate
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.evaluate.fidelity import ask, figures
from tunesmith.evaluate.fidelity.ask import Distributions
from tunesmith.evaluate.fidelity.figures import Answers
from tunesmith.evaluate.fidelity.worker import Worker
from tunesmith.evaluate.heldout import HeldOut, Scored, hold_out
from tunesmith.evaluate.metrics import TEXT_METRICS
from tunesmith.ledger import Artifact, Work
from tunesmith.pipeline import Stages
from tunesmith.pipeline.rows import sample_rows
from tunesmith.terminal import log

_GOLDEN_PROMPTS = 4
_ROUNDS, _ROUND_TOKENS = 5, 32
_CALIBRATION_SEQUENCES = 32


@dataclass(frozen=True)
class Side:
    """All that one model was asked."""

    facts: dict[str, Any]
    scored: list[Distributions]
    answers: Answers


@dataclass
class Parent:
    """The uncompressed model: its engine, and what it said of the held-out rows."""

    worker: Worker
    name: str
    held_out: HeldOut
    sources: dict[str, str | None]
    side: Side
    arguments: dict[str, Any]
    """Of its engine, which leaves room for a second one."""


@contextlib.contextmanager
def opened_parent(stages: Stages) -> Iterator[Parent]:
    """The parent of the recipe's checkpoints, asked once for all of them."""
    name = stages.unquantized_name
    spec = engine_spec(stages, name)
    # On a GPU each engine reserves its share of the memory when it starts.
    half = spec.settings.gpu_memory_utilization / 2
    arguments: dict[str, Any] = {"max_logprobs": ask.TOP_K}
    if has_gpu_engine():
        arguments["gpu_memory_utilization"] = half
    with Worker(spec) as worker:
        log(f"fidelity: starting the engine of {name}")
        try:
            worker.load(**arguments)
        except TunesmithError as error:
            if not has_gpu_engine():
                raise
            raise TunesmithError(
                f"{error}\nthe parent and a checkpoint are open side by side, each with half of "
                f"engine.gpu_memory_utilization ({half:g}); where the parent needs more, set "
                "engine.tensor_parallel_size, or quantize.verify_rows=0 to leave them unverified"
            ) from error
        facts = worker.call(ask.facts)
        held_out, sources = _held_out(stages, spec, facts["max_model_len"])
        side = _asked(stages, worker, held_out, facts, name)
        yield Parent(worker, name, held_out, sources, side, arguments)


def measure_fidelity(stages: Stages, scheme: str, parent: Parent, work: Work) -> None:
    """Fill a fidelity artifact; a checkpoint that vLLM refuses is one that does not load."""
    checkpoint = stages.made(stages.quantized(scheme))
    log(f"fidelity {scheme}: starting the engine")
    with Worker(engine_spec(stages, scheme)) as worker:
        try:
            worker.load(**parent.arguments)
        except ModelError as error:
            work.metrics |= {"loads": False, "refusal": str(error)}
            return
        facts = worker.call(ask.facts)
        side = _asked(stages, worker, parent.held_out, facts, scheme)
        log(f"fidelity {scheme}: speed against {parent.name}, in turns")
        speed = _speeds(stages, worker, parent)
        peaks = [one.call(ask.peak_bytes) for one in (worker, parent.worker)]
    rows = _rows(stages, parent, side)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (work.out / "rows.jsonl").write_text(text, encoding="utf-8")
    section = _section(stages)
    names = [item.id for item in parent.held_out.items[:_GOLDEN_PROMPTS]]
    work.metrics |= {
        "loads": True,
        "scheme": scheme,
        "rows": len(rows),
        "confidence": section.confidence,
        "golden": figures.golden((parent.side.answers, side.answers), names),
        **figures.summarize(rows, _texts(section), section.confidence, stages.recipe.seed),
        "calibration": _calibration(stages, checkpoint, parent),
        "speed": speed,
        "engine": {**facts, "peak_bytes": peaks[0]},
        "parent_engine": {**parent.side.facts, "peak_bytes": peaks[1]},
    }


def _section(stages: Stages) -> Evaluate:
    return stages.recipe.evaluate or Evaluate()


def _texts(section: Evaluate) -> list[str]:
    return [task for task in section.tasks if task in TEXT_METRICS]


def _held_out(
    stages: Stages, spec: EngineSpec, max_model_len: int
) -> tuple[HeldOut, dict[str, str | None]]:
    """The rows to compare on, every one with a prompt; and the source of each."""
    recipe = stages.recipe
    assert recipe.quantize and recipe.data
    path = stages.made(stages.dataset).root / "evaluation.jsonl"
    rows = sample_rows(path, recipe.quantize.verify_rows, recipe.seed)
    found = hold_out(
        rows,
        spec.model,
        chat_template=spec.chat_template,
        max_length=recipe.data.max_length,
        max_model_len=max_model_len,
        max_tokens=_section(stages).max_tokens,
        trust_remote_code=spec.trust_remote_code,
    )
    # Plain text has no prompt: its first half is one.
    found.items = [
        item
        if item.prompt_ids
        else replace(item, prompt_ids=_half(item.scored[0].input_ids, max_model_len))
        for item in found.items
    ]
    return found, {row["id"]: row.get("source") for row in rows}


def _half(input_ids: list[int], max_model_len: int) -> list[int]:
    return input_ids[: max(1, min(len(input_ids), max_model_len) // 2)]


def _asked(
    stages: Stages, worker: Worker, held_out: HeldOut, facts: dict[str, Any], name: str
) -> Side:
    sequences = [one for item in held_out.items for one in item.scored]
    scored = worker.call(ask.score, sequences, f"{name}: losses")
    prompts = {item.id: item.prompt_ids for item in held_out.items if item.prompt_ids}
    answers = worker.call(
        ask.answer,
        prompts,
        held_out.end_of_turn_id,
        _section(stages).max_tokens,
        f"{name}: answers",
    )
    return Side(facts, scored, answers)


def _rows(stages: Stages, parent: Parent, child: Side) -> list[dict[str, Any]]:
    of_parent, of_child = iter(parent.side.scored), iter(child.scored)
    return [
        figures.row_of(
            item,
            parent.sources[item.id],
            [next(of_parent) for _ in item.scored],
            [next(of_child) for _ in item.scored],
            (parent.side.answers, child.answers),
            _texts(_section(stages)),
        )
        for item in parent.held_out.items
    ]


def _speeds(stages: Stages, child: Worker, parent: Parent) -> dict[str, Any]:
    """Decoding of one request and of as many as the engine takes, in alternating rounds."""
    prompts = [item.prompt_ids for item in parent.held_out.items if item.prompt_ids]
    room = parent.side.facts["max_model_len"] - _ROUND_TOKENS
    prompts = [ids for ids in prompts if len(ids) <= room] or [prompts[0][:room]]
    many = [prompts[at % len(prompts)] for at in range(stages.recipe.engine.max_num_seqs)]
    confidence, seed = _section(stages).confidence, stages.recipe.seed
    found = {}
    for name, asked in (("batch_1", prompts[:1]), ("saturation", many)):
        child_s, parent_s = _rounds([child, parent.worker], asked)
        tokens = len(asked) * _ROUND_TOKENS
        change = figures.rate_change(tokens, child_s, parent_s, confidence, seed)
        found[name] = {"requests": len(asked), "rounds": _ROUNDS, **change}
    return found


def _rounds(workers: Sequence[Worker], prompts: list[list[int]]) -> list[list[float]]:
    """Seconds of each worker's rounds, taken in turns; the first of each only warms up."""
    seconds: list[list[float]] = [[] for _ in workers]
    for _ in range(1 + _ROUNDS):
        for worker, column in zip(workers, seconds, strict=True):
            column.append(worker.call(ask.round_s, prompts, _ROUND_TOKENS))
    return [column[1:] for column in seconds]


def _calibration(stages: Stages, checkpoint: Artifact, parent: Parent) -> dict[str, Any] | None:
    """How well the parent knows the text that the checkpoint was calibrated on; None where there
    was none, or it is not in this store."""
    path = stages.calibration_file(checkpoint.manifest.label)
    if not path.is_file():
        return None
    limit = parent.side.facts["max_model_len"] - 1
    examples = json.loads(path.read_text(encoding="utf-8"))[:_CALIBRATION_SEQUENCES]
    sequences = [Scored(ids[:limit], [1]) for ids in examples if len(ids) > 1]
    if not sequences:
        return None
    scored = parent.worker.call(ask.score, sequences, f"{parent.name}: calibration")
    confidence, seed = _section(stages).confidence, stages.recipe.seed
    return {
        "sequences": len(sequences),
        "loss": figures.mean_loss(scored, confidence, seed)._asdict(),
        "held_out_loss": figures.mean_loss(parent.side.scored, confidence, seed)._asdict(),
        "vocabulary": parent.side.facts["vocabulary"],
    }
