"""One start of an engine and one round of every load, kept as JSON, for what takes turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import Window
from tunesmith.bench.measure import Meter, Phase
from tunesmith.bench.rig import Rig, on_server
from tunesmith.bench.validity import Evidence, faults
from tunesmith.engine import EngineSpec


class Phases(NamedTuple):
    """The loads of a round, or of several rounds together."""

    prompts: Phase
    full_queue: Phase
    arrivals: Phase


def one_round(rig: Rig, name: str, spec: EngineSpec, log_path: Path) -> dict[str, Any]:
    """Start an engine and put every load on it once. Raises ModelError when it refuses."""

    async def measure(meter: Meter) -> Phases:
        await meter.warm_up()
        return Phases(
            await meter.prompts_only(),
            await meter.full_queue(rounds=1),
            await meter.arrivals(rounds=1),
        )

    measured = on_server(rig, name, spec, log_path, measure)
    rounds = {key: asdict(phase.rounds[0]) for key, phase in measured.found._asdict().items()}
    return {
        "load_s": measured.load_s,
        "wall_s": measured.wall_s,
        "engine_bytes": measured.engine_bytes,
        **rounds,
    }


def phases(rounds: Sequence[dict[str, Any]]) -> Phases:
    """What `one_round` returned so many times, load by load."""
    return Phases(*(_phase([_evidence(one[key]) for one in rounds]) for key in Phases._fields))


def read_json(path: Path) -> dict[str, Any]:
    """A round that was kept."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _phase(rounds: list[Evidence]) -> Phase:
    return Phase(tuple(rounds), faults(rounds))


def _evidence(kept: dict[str, Any]) -> Evidence:
    """What `asdict` made of it, back."""
    samples = [
        Sample(**one | {key: tuple(one[key]) for key in ("piece_s", "piece_tokens")})
        for one in kept["samples"]
    ]
    counted, window = Counters(**kept["counted"]), Window(*kept["window"])
    return Evidence(**kept | {"samples": samples, "counted": counted, "window": window})
