"""`tunesmith bench compare A B`: whether one run is faster than another, or nothing shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.cells import invalid
from tunesmith.bench.client import Sample
from tunesmith.bench.figures import (
    PERCENTILES,
    Window,
    latencies_ms,
    round_figures,
    throughput,
)
from tunesmith.config import UserError
from tunesmith.ledger import Store
from tunesmith.pipeline.bench import NOT_LOAD
from tunesmith.statistics import Interval
from tunesmith.statistics.independent import (
    ENOUGH_ROUNDS,
    difference_in_turns,
    relative_difference,
)
from tunesmith.terminal import make_table

SCHEMA = 2
_ORDER = [
    "output_tokens_per_s",
    *(f"{name}_ms p{at}" for name in ("e2e", "ttft", "tpot", "itl") for at in PERCENTILES),
]


@dataclass(frozen=True)
class Measured:
    """One variant of one artifact, read back."""

    name: str
    """For people."""
    mode: str
    load: Mapping[str, Any]
    """The keys of `bench` that say what was asked."""
    figures: Mapping[str, Any]
    rounds: Sequence[tuple[list[Sample], Window]]

    @property
    def samples(self) -> list[Sample]:
        return [sample for samples, _ in self.rounds for sample in samples]


def run(store: Store, first: str, second: str) -> dict[str, Any]:
    """Compare two runs, each `ID`, `ID:VARIANT` or the path of a `bench.json`.

    Raises UserError when they are not of the same load.
    """
    left, right = read_measured(store, first), read_measured(store, second)
    pairs = [(left[name], right[name]) for name in left if name in right]
    if not pairs and len(left) == len(right) == 1:
        pairs = [(next(iter(left.values())), next(iter(right.values())))]
    if not pairs:
        raise UserError(
            f"{first} has {', '.join(left)} and {second} has {', '.join(right)}: "
            "name one of each as ID:VARIANT"
        )
    return {"comparisons": [compare(*pair) for pair in pairs]}


def read_measured(store: Store, reference: str) -> dict[str, Measured]:
    """Every variant that a reference names; those that were refused are left out."""
    name, _, variant = reference.partition(":")
    path = Path(name)
    if path.suffix != ".json":
        artifact = store.get(name)
        path, name = artifact.root / "bench.json", artifact.id
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{reference}: {path} is no result of a benchmark: {error}") from error
    if found.get("schema_version") != SCHEMA or found.get("mode") not in ("batch", "serve"):
        raise UserError(f"{reference}: compare takes results of bench batch and bench serve")
    load = {key: value for key, value in found["bench"].items() if key not in NOT_LOAD}
    kept = {
        key: measured(f"{name}:{key}", found["mode"], load, entry)
        for key, entry in found["variants"].items()
        if "samples" in entry and key == (variant or key)
    }
    if not kept:
        raise UserError(f"{reference}: it has {', '.join(found['variants'])}, none of it measured")
    return kept


def compare(left: Measured, right: Measured, *, in_turns: bool = False) -> dict[str, Any]:
    """How `right` differs from `left`: every figure with its interval, and one verdict.

    The verdict is that of one figure, named before anything was measured: the more figures are
    asked, the more of them differ by chance. Where the rounds were measured in turns, the interval
    is that of their pairs, and a machine that changes meanwhile is no fault: it did so for both.
    """
    _require_same_load(left, right)
    in_turns = in_turns and len(left.rounds) == len(right.rounds) >= ENOUGH_ROUNDS
    changes = {name: change._asdict() for name, change in _changes(left, right, in_turns).items()}
    borne = {"noisy_machine"} if in_turns else set()
    faults = {
        one.name: found
        for one in (left, right)
        if (found := [fault for fault in one.figures["faults"] if fault["check"] not in borne])
    }
    judged = "output_tokens_per_s" if left.mode == "batch" else "e2e_ms p50"
    return {
        "a": left.name,
        "b": right.name,
        "mode": left.mode,
        "judged": judged,
        "verdict": verdict(changes.get(judged), is_valid=not faults, higher=left.mode == "batch"),
        "changes": changes,
        "faults": faults,
        "rounds": [len(left.rounds), len(right.rounds)],
        "same_work": _work(left) == _work(right),
    }


def verdict(change: Mapping[str, float] | None, *, is_valid: bool, higher: bool) -> str:
    """faster, slower, no difference shown; invalid where a run may not be believed."""
    if change is None or not is_valid:
        return "invalid"
    if change["low"] <= 0 <= change["high"]:
        return "no difference shown"
    return "faster" if (change["value"] > 0) == higher else "slower"


def show(result: dict[str, Any]) -> RenderableType:
    """A table of changes, and the verdict in a sentence."""
    parts: list[RenderableType] = []
    for found in result["comparisons"]:
        rows = [
            [name, *(f"{100 * change[key]:+.1f} %" for key in ("value", "low", "high"))]
            for name, change in found["changes"].items()
        ]
        title = f"{found['b']} against {found['a']} · {found['mode']}"
        parts += [make_table(title, ["figure", "change", "95 % from", "to"], rows)]
        parts += [Text(sentence) for sentence in _sentences(found)]
    return Group(*parts)


def _sentences(found: Mapping[str, Any]) -> list[str]:
    change = found["changes"].get(found["judged"])
    sentences = [f"Verdict, by {found['judged']}: {found['verdict']}."]
    if found["verdict"] == "no difference shown" and change:
        shown = 100 * (change["high"] - change["low"]) / 2
        sentences.append(f"A difference of {shown:.1f} % or more would have shown.")
    for name, faults in found["faults"].items():
        sentences += invalid(name, faults)
    if min(found["rounds"]) < 2:
        sentences.append("With one round, what the machine does between runs is not in this.")
    if not found["same_work"]:
        sentences.append("Their tokens differ: the two do not cut the same text alike.")
    return sentences


def _levels(one: Measured) -> dict[str, Interval]:
    """Every figure of a run with the interval of resampling it."""
    found: dict[str, Interval] = {}
    if rates := throughput(one.rounds, seed=0):
        found["output_tokens_per_s"] = rates.output_tokens_per_s
    for name, percents in latencies_ms(one.samples, seed=0).items():
        found |= {f"{name} {percent}": level for percent, level in percents.items()}
    return found


def _changes(left: Measured, right: Measured, in_turns: bool) -> dict[str, Interval]:
    levels = [_levels(one) for one in (left, right)]
    points = [[round_figures(*part) for part in one.rounds] for one in (left, right)]
    found = {}
    for name in _ORDER:
        if not all(name in level and level[name].value > 0 for level in levels):
            continue
        a, b = ([part[name] for part in column if part.get(name, 0.0) > 0] for column in points)
        if in_turns and len(a) == len(b) == len(left.rounds):
            found[name] = difference_in_turns(b, a)
        else:
            found[name] = relative_difference(levels[1][name], levels[0][name], b, a)
    return found


def _require_same_load(left: Measured, right: Measured) -> None:
    if left.mode != right.mode:
        raise UserError(f"{left.name} is of bench {left.mode}, {right.name} of {right.mode}")
    differ = [
        f"bench.{key} is {left.load.get(key)} and {right.load.get(key)}"
        for key in sorted({*left.load, *right.load})
        if left.load.get(key) != right.load.get(key)
    ]
    if differ:
        raise UserError(
            f"{left.name} and {right.name} are not of the same load: {'; '.join(differ)}"
        )


def _work(one: Measured) -> tuple[float, int]:
    """Tokens of the requests of a round."""
    samples = one.samples
    return (
        float(np.mean([sample.input_tokens for sample in samples])),
        max(sample.output_tokens for sample in samples),
    )


def measured(name: str, mode: str, load: Mapping[str, Any], entry: Mapping[str, Any]) -> Measured:
    """A variant's entry of a `bench.json`, read back."""
    rounds: list[tuple[list[Sample], Window]] = [
        ([], Window(one["start_s"], one["end_s"])) for one in entry["rounds"]
    ]
    for kept in entry["samples"]:
        fields = {key: value for key, value in kept.items() if key not in ("round", "usd")}
        fields |= {key: tuple(fields[key]) for key in ("piece_s", "piece_tokens")}
        rounds[kept["round"]][0].append(Sample(**fields))
    return Measured(name, mode, load, entry["figures"], rounds)
