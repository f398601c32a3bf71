"""What the report says, gathered from the artifacts that exist. What is missing stays None."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config import TunesmithError, UserError
from tunesmith.ledger import Artifact, Draft
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import summary_of
from tunesmith.statistics import Interval, Rows, compare, level

BENCH_MODES = ("batch", "serve")


@dataclass(frozen=True)
class Change:
    """The loss of one variant against another's, paired row by row."""

    against: str
    relative: Interval
    """0.01 is a loss that is 1 % higher."""
    excludes_zero: bool


@dataclass(frozen=True)
class Variant:
    """One model of the recipe."""

    name: str
    artifact: Artifact | None
    size_bytes: int | None
    """Of its weights; of base and adapter together for an adapter."""
    loss: Interval | None
    """Nats per learnt token of the held-out answers."""
    change: Change | None
    chrf: Interval | None
    bench: dict[str, dict[str, Any]]
    """Figures by mode, as the bench artifact has them; those that were measured."""


@dataclass(frozen=True)
class Curve:
    """One line of the training log."""

    steps: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Checkpoint:
    """One compressed checkpoint, and what its verification came to."""

    name: str
    size_bytes: int
    parent_bytes: int
    layers: dict[str, dict[str, float]]
    """By layer, how far its weights are from the parent's."""
    found: dict[str, Any]
    """Verdict and figures, as `summary_of` gives them."""


@dataclass(frozen=True)
class Made:
    """One artifact of the recipe, for the table of stages and the lineage."""

    artifact: Artifact
    depth: int
    """How far down the lineage it stands."""
    others: dict[str, str]
    """Its further parents, role → id, where it has more than the one it stands under."""


@dataclass(frozen=True)
class Contents:
    """Everything the page shows."""

    stages: Stages
    variants: list[Variant]
    confidence: float
    training: Curve | None
    held_out: Curve | None
    serve_samples: dict[str, list[dict[str, Any]]]
    """Raw samples of the real-time load by variant."""
    checkpoints: list[Checkpoint]
    lineage: list[Made]
    missing: list[str]
    """Sentences that name what is not there and the command that makes it."""


def gather(stages: Stages) -> Contents:
    """Read what there is; raises only for a recipe that has no stages at all."""
    benches = {mode: _bench(stages, mode) for mode in BENCH_MODES}
    training, held_out = _curves(stages)
    return Contents(
        stages=stages,
        variants=_variants(stages, benches),
        confidence=stages.recipe.evaluate.confidence if stages.recipe.evaluate else 0.95,
        training=training,
        held_out=held_out,
        serve_samples=_samples(benches["serve"]),
        checkpoints=_checkpoints(stages),
        lineage=_lineage([artifact for artifact in _all(stages) if artifact]),
        missing=_missing(stages),
    )


def _variants(stages: Stages, benches: dict[str, Artifact | None]) -> list[Variant]:
    rows = {name: _evaluation_rows(stages, name) for name in stages.variants}
    return [
        _variant(stages, name, rows, benches) for name in stages.variants if _shown(stages, name)
    ]


def _shown(stages: Stages, name: str) -> bool:
    """The unmerged adapter only where somebody measured it: `tuned` is the same training."""
    evaluated = stages.recipe.evaluate is not None and name in stages.evaluated
    return name != "adapter" or "tuned" not in stages.variants or evaluated


def _variant(
    stages: Stages, name: str, rows: dict[str, Rows | None], benches: dict[str, Artifact | None]
) -> Variant:
    recipe = stages.recipe
    artifact = _found(stages, stages.variants[name])
    own = rows[name]
    confidence = recipe.evaluate.confidence if recipe.evaluate else 0.95
    against = "tuned" if rows.get("tuned") and name not in ("base", "tuned") else "base"
    other = rows.get(against) if name != "base" else None
    bench = {
        mode: found.manifest.metrics["variants"].get(name)
        for mode, found in benches.items()
        if found
    }
    return Variant(
        name=name,
        artifact=artifact,
        size_bytes=_size_bytes(stages, artifact),
        loss=level(own, "completion_loss", confidence, recipe.seed) if own else None,
        change=_change(own, other, against, confidence, recipe.seed) if own and other else None,
        chrf=level(own, "chrf", confidence, recipe.seed) if own else None,
        bench={mode: figures for mode, figures in bench.items() if figures},
    )


def _change(own: Rows, other: Rows, against: str, confidence: float, seed: int) -> Change | None:
    try:
        found = compare(own, other, "completion_loss", confidence, seed)
    except TunesmithError:  # other tokenizers: losses per token of different texts
        return None
    if found is None or found.relative is None:
        return None
    return Change(against, found.relative, found.excludes_zero)


def _size_bytes(stages: Stages, artifact: Artifact | None) -> int | None:
    if artifact is None:
        return None
    weights = sum(
        entry.size_bytes
        for name, entry in artifact.manifest.files.items()
        if name.endswith((".safetensors", ".bin"))
    )
    if artifact.manifest.kind != "adapter":
        return weights or None
    return weights + (_size_bytes(stages, _found(stages, stages.base)) or 0)


def _evaluation_rows(stages: Stages, name: str) -> Rows | None:
    if stages.recipe.evaluate is None:
        return None
    artifact = _found(stages, stages.evaluation(name))
    return _read_lines(artifact, "rows.jsonl") if artifact else None


def _curves(stages: Stages) -> tuple[Curve | None, Curve | None]:
    artifact = _found(stages, stages.trained) if stages.recipe.train else None
    lines = _read_lines(artifact, "metrics.jsonl") if artifact else []
    return _curve(lines, "loss"), _curve(lines, "eval_loss")


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve | None:
    points = [line for line in lines if name in line]
    if not points:
        return None
    return Curve([point["step"] for point in points], [point[name] for point in points])


def _bench(stages: Stages, mode: str) -> Artifact | None:
    return _found(stages, stages.bench(mode)) if stages.recipe.bench else None


def _samples(bench: Artifact | None) -> dict[str, list[dict[str, Any]]]:
    if bench is None:
        return {}
    entries = json.loads((bench.root / "bench.json").read_text(encoding="utf-8"))["variants"]
    return {name: entry["samples"] for name, entry in entries.items() if "samples" in entry}


def _checkpoints(stages: Stages) -> list[Checkpoint]:
    made = []
    for name, found in summary_of(stages).items():
        artifact = _found(stages, stages.quantized(name))
        if artifact and "parent_bytes" in (metrics := artifact.manifest.metrics):
            sizes = metrics["bytes"], metrics["parent_bytes"]
            made.append(Checkpoint(name, *sizes, metrics.get("layers", {}), found))
    return made


def _read_lines(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    text = (artifact.root / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _found(stages: Stages, draft: Draft) -> Artifact | None:
    return stages.store.find(draft.id)


def _all(stages: Stages) -> list[Artifact | None]:
    """Every artifact that the recipe speaks of, in the order in which they are made."""
    recipe = stages.recipe
    drafts = [stages.dataset] if recipe.data else []
    drafts += list(stages.variants.values())
    if recipe.train:
        drafts += [stages.trained]
    drafts += stages.fidelities
    if recipe.evaluate:
        drafts += [stages.evaluation(name) for name in stages.evaluated]
    if recipe.batch:
        with contextlib.suppress(UserError):  # its input may be gone by now
            drafts += [stages.batch()]
    if recipe.bench:
        drafts += [stages.bench(mode) for mode in BENCH_MODES]
    found = [_found(stages, draft) for draft in drafts]
    parents = [
        stages.store.find(parent)
        for artifact in found
        if artifact
        for parent in artifact.manifest.parents.values()
    ]
    return [*parents, *found]


_CLOSEST = ("adapter", "checkpoint", "parent", "model", "base")
"""Roles of a parent, the one first that an artifact is drawn under; data comes last."""


def _lineage(artifacts: Sequence[Artifact]) -> list[Made]:
    """The artifacts as a tree, each once, under the parent that it is closest to."""
    known = {artifact.id: artifact for artifact in artifacts}
    under = {artifact.id: _closest(artifact, known) for artifact in known.values()}
    made: list[Made] = []

    def add(artifact_id: str | None, depth: int) -> None:
        children = [child for child, parent in under.items() if parent == artifact_id]
        for child in sorted(children, key=lambda child: known[child].manifest.created_at):
            parents = known[child].manifest.parents.items()
            others = {role: parent for role, parent in parents if parent != under[child]}
            made.append(Made(known[child], depth, others))
            add(child, depth + 1)

    add(None, 0)
    return made


def _closest(artifact: Artifact, known: dict[str, Artifact]) -> str | None:
    parents = {
        role: parent for role, parent in artifact.manifest.parents.items() if parent in known
    }
    models = [role for role in parents if role != "data"]
    if artifact.manifest.kind == "bench" and len(models) > 1:
        return None  # it compares them, and belongs to none
    roles = [*(role for role in _CLOSEST if role in parents), *models, *parents]
    return parents[roles[0]] if roles else None


def _missing(stages: Stages) -> list[str]:
    recipe = stages.recipe
    wanted: dict[str, dict[str, Draft]] = {}
    if recipe.train:
        wanted["train"] = {"training": stages.trained}
    if recipe.quantize:
        wanted["quantize"] = {name: stages.quantized(name) for name in stages.schemes}
        wanted["eval --fidelity"] = {draft.label: draft for draft in stages.fidelities}
    if recipe.evaluate:
        wanted["eval"] = {f"eval {name}": stages.evaluation(name) for name in stages.evaluated}
    if recipe.bench:
        wanted["bench all"] = {f"bench {mode}": stages.bench(mode) for mode in BENCH_MODES}
    lines = []
    for command, drafts in wanted.items():
        names = [name for name, draft in drafts.items() if _found(stages, draft) is None]
        if names:
            listed = ", ".join(names)
            lines.append(f"Not made: {listed}. Run: tunesmith {command} {stages.path}")
    return lines
