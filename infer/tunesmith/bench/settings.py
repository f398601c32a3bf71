"""`tunesmith bench settings`: which values of the `engine` section matter, and the best.

One key after the other. The values of a key take turns with the best settings so far (A, B, C, A,
B, C), and one takes their place only where the interval of its full queue's throughput says that it
is faster, and it keeps the promise if they did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.bench.cells import invalid, settings_columns, settings_rows
from tunesmith.bench.compare import Measured, compare, measured
from tunesmith.bench.results import doubts, phase_figures, samples_of
from tunesmith.bench.rig import Rig, bench_of, open_rig, write_bench, write_json
from tunesmith.bench.turns import one_round, phases, read_json
from tunesmith.config import ModelError, UserError
from tunesmith.config.schema.bench import Settings
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec, engine_spec
from tunesmith.ledger import Work
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.terminal import log, make_table

Step = dict[str, Any]


def run(stages: Stages) -> dict[str, Any]:
    """Measure what is not measured yet. Raises UserError when there is nothing to try, ModelError
    when the engine refuses the model as the recipe has it."""
    if not asked(bench_of(stages).settings):
        raise UserError(f"{stages.path}: bench settings needs values to try in bench.settings")
    draft = stages.bench("settings")
    if (found := stages.store.find(draft.id)) is None:
        (name,) = stages.benched("settings")
        require_approval(stages, name)
        spec = engine_spec(stages, name)
        with contextlib.ExitStack() as opened:
            work = opened.enter_context(stages.store.write(draft, stages.recipe))
            rig = opened.enter_context(open_rig(stages))
            result = _search(Turns(rig, work, name, spec), spec.settings)
            write_bench(stages, work, "settings", model=name, **result)
            work.metrics |= {"model": name, **_brief(result)}
        found = stages.made(draft)
    metrics = found.manifest.metrics
    return {"id": found.id, **{key: metrics[key] for key in ("model", "steps", "best")}}


def asked(settings: Settings) -> dict[str, tuple[Any, ...]]:
    """The keys that have values to try."""
    return {key: values for key, values in settings if values}


class Turns:
    """Rounds of one model under this and that setting, each on disk as soon as it is measured."""

    def __init__(self, rig: Rig, work: Work, name: str, spec: EngineSpec) -> None:
        self.rig = rig
        self._folder, self._name, self._spec = work.scratch, name, spec

    def take(
        self, key: str, settings: Mapping[Any, Engine]
    ) -> dict[Any, list[dict[str, Any]] | str]:
        """The rounds of each, measured in turns, by value; or why the engine refuses it."""
        found: dict[Any, list[dict[str, Any]] | str] = {value: [] for value in settings}
        for place in range(self.rig.bench.rounds):
            for value, engine in settings.items():
                rounds = found[value]
                if isinstance(rounds, str):
                    continue
                log(f"bench settings: round {place + 1}/{self.rig.bench.rounds}: {key} {value}")
                try:
                    rounds.append(self._round(self._path(key, value, place), engine))
                except ModelError as error:
                    log(f"bench settings: {key} {value} is refused: {error}")
                    found[value] = str(error)
        return found

    def needed_s(self, key: str, settings: Mapping[Any, Engine]) -> float:
        """About how long the rounds take that are not measured yet."""
        paths = [
            self._path(key, value, place)
            for value in settings
            for place in range(self.rig.bench.rounds)
        ]
        return max(self._seconds, default=0.0) * sum(not path.exists() for path in paths)

    @property
    def spent_s(self) -> float:
        """By all rounds, those of earlier attempts too."""
        return sum(self._seconds)

    @property
    def _seconds(self) -> list[float]:
        return [read_json(path)["wall_s"] for path in self._folder.glob("*.round-*.json")]

    def _path(self, key: str, value: Any, place: int) -> Path:
        return self._folder / f"{key}={value}.round-{place}.json"

    def _round(self, path: Path, engine: Engine) -> dict[str, Any]:
        if not path.exists():
            spec = replace(self._spec, settings=engine)
            write_json(path, one_round(self.rig, self._name, spec, path.with_suffix(".log")))
        return read_json(path)


def _search(turns: Turns, best: Engine) -> dict[str, Any]:
    steps: list[Step] = []
    for key, values in asked(turns.rig.bench.settings).items():
        before = getattr(best, key)
        others = [value for value in dict.fromkeys(values) if value != before]
        if not others:
            continue
        settings = {value: best.model_copy(update={key: value}) for value in (before, *others)}
        needed_s = turns.needed_s(key, settings)
        if turns.spent_s + needed_s > turns.rig.bench.search_s:
            left_s = max(0.0, turns.rig.bench.search_s - turns.spent_s)
            skipped = f"it takes about {needed_s:.0f} s, bench.search_s has {left_s:.0f} s left"
            steps.append({"key": key, "best": before, "tried": [], "skipped": skipped})
            continue
        step = _step(turns, key, settings)
        best = settings[step["best"]]
        steps.append(step)
    return {"steps": steps, "best": best.model_dump(mode="json")}


def _step(turns: Turns, key: str, settings: Mapping[Any, Engine]) -> Step:
    """One key: the best settings so far, which come first, and each other value in their place."""
    rounds = turns.take(key, settings)
    own, *tried = (_entry(turns.rig, value, rounds[value]) for value in settings)
    if "refused" in own:
        raise ModelError(own["refused"])
    for entry in tried:
        if "refused" not in entry:
            found = compare(_measured(own), _measured(entry), in_turns=True)
            entry["change"] = found["changes"].get("output_tokens_per_s")
            entry["verdict"] = found["verdict"]
    better = [
        entry
        for entry in tried
        if entry.get("verdict") == "faster"
        and (entry["goodput"]["slo_kept"] or not own["goodput"]["slo_kept"])
    ]
    chosen = max(better, key=lambda entry: float(entry["change"]["value"]), default=own)
    return {"key": key, "best": chosen["value"], "tried": [own, *tried]}


def _entry(rig: Rig, value: Any, rounds: list[dict[str, Any]] | str) -> dict[str, Any]:
    """What is known of one value: its figures, or why the engine refuses it."""
    if isinstance(rounds, str):
        return {"value": value, "refused": rounds}
    prompts, full_queue, arrivals = phases(rounds)
    doubtful = doubts(full_queue, prompts)
    saturated = phase_figures(full_queue, rig.bench, rig.seed)
    arriving = phase_figures(arrivals, rig.bench, rig.seed)
    return {
        "value": value,
        "valid": not doubtful,
        "faults": [asdict(fault) for fault in doubtful],
        "output_tokens_per_s": saturated["output_tokens_per_s"],
        "preemptions": saturated["preemptions"],
        **{name: arriving[name] for name in ("goodput", "ttft_ms", "tpot_ms")},
        "engine_bytes": max((one["engine_bytes"] or 0 for one in rounds), default=0) or None,
        "rounds": [one.window for one in full_queue.rounds],
        "samples": samples_of(full_queue, rig.hour_usd),
    }


def _measured(entry: Mapping[str, Any]) -> Measured:
    """A full queue as `compare` takes it."""
    return measured(
        str(entry["value"]),
        "batch",
        {},
        {
            "figures": entry,
            "rounds": [{"start_s": start_s, "end_s": end_s} for start_s, end_s in entry["rounds"]],
            "samples": entry["samples"],
        },
    )


def _brief(result: Mapping[str, Any]) -> dict[str, Any]:
    """Without samples."""
    steps = [
        step
        | {
            "tried": [
                {key: value for key, value in entry.items() if key not in ("samples", "rounds")}
                for entry in step["tried"]
            ]
        }
        for step in result["steps"]
    ]
    return {"steps": steps, "best": result["best"]}


def show(result: dict[str, Any]) -> RenderableType:
    """One line for each value of each key, and the section to put into the recipe."""
    title = f"bench settings · {result['id']} · {result['model']}"
    parts: list[RenderableType] = [
        make_table(title, settings_columns(), settings_rows(result["steps"]))
    ]
    parts += [Text(sentence) for sentence in remarks(result["steps"])]
    return Group(*parts, Text(advice(result)))


def remarks(steps: Sequence[Step]) -> list[str]:
    """What was not tried, refused or is in doubt, and why."""
    found = [
        f"{step['key']} was not tried: {step['skipped']}" for step in steps if "skipped" in step
    ]
    for step in steps:
        for entry in step["tried"]:
            name = f"{step['key']}: {entry['value']}"
            if "refused" in entry:
                found.append(f"{name} cannot run here: {entry['refused']}")
            found += invalid(name, entry.get("faults", ()))
    return found


def advice(result: Mapping[str, Any]) -> str:
    """Which keys matter, and the ones to change as YAML."""
    changed = {
        step["key"]: step["best"]
        for step in result["steps"]
        if step["tried"] and step["best"] != step["tried"][0]["value"]
    }
    matter = [
        step["key"]
        for step in result["steps"]
        if any(entry.get("verdict") in ("faster", "slower") for entry in step["tried"])
    ]
    said = f"Keys that matter: {', '.join(matter) or 'none was shown to'}. "
    if not changed:
        return said + "The recipe's own values stay."
    return said + f"Put into the recipe: {yaml.safe_dump({'engine': changed}).strip()}"
