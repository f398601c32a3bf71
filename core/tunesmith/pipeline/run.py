"""`tunesmith run`: every section of a recipe in order, each as a subprocess of this same CLI.

Processes keep GPU memory and crashes of one stage away from the next. What is made already is
found by its id and skipped; what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import GateError, Recipe, TunesmithError, WorkInterrupted, load_recipe
from tunesmith.ledger import Draft
from tunesmith.pipeline.files import is_uri
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table

_INTERRUPTED = WorkInterrupted.exit_code
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Step:
    """One subprocess of a run."""

    name: str
    command: tuple[str, ...]
    makes: tuple[Draft, ...]
    outputs: tuple[Path, ...] = ()
    """Files outside the store that the step also leaves."""

    recipe: Path | None = None
    """Another recipe that it runs, in the same store."""


def steps(stages: Stages) -> list[Step]:
    """What the recipe's sections ask for, in order, made or not."""
    recipe = stages.recipe
    found = []
    if recipe.data:
        found.append(Step("data", ("data", "--rows", "0"), (stages.dataset,)))
    if recipe.quantize and stages.builds_base and stages.unquantized_name == "base":
        path = Path(stages.builtin_base.path)
        found.append(Step("base", ("train",), (stages.base,), recipe=path))
    made = [stages.quantized(scheme) for scheme in stages.schemes] + stages.fidelities
    quantizing = [Step("quantize", ("quantize",), tuple(made))] if recipe.quantize else []
    if recipe.train and recipe.train.over:
        found += quantizing
    if recipe.train:
        made = [
            stages.variants[name]
            for name in ("base", "adapter", "tuned")
            if name in stages.variants
        ]
        found.append(Step("train", ("train",), tuple(made)))
    if not recipe.train or not recipe.train.over:
        found += quantizing
    if recipe.quantize and recipe.quantize.recovered:
        made = [stages.recovered(scheme) for scheme in recipe.quantize.recovered]
        found.append(Step("recover", ("recover",), tuple(made)))
    if recipe.evaluate:
        made = [stages.evaluation(name) for name in stages.evaluated]
        found.append(Step("eval", ("eval",), tuple(made)))
    if recipe.batch:
        found.append(Step("batch", ("batch",), (stages.batch(),), _local(recipe.batch.output)))
    if recipe.bench:
        found.append(
            Step("bench", ("bench", "all"), (stages.bench("batch"), stages.bench("serve")))
        )
    return found


def _local(output: str) -> tuple[Path, ...]:
    return () if is_uri(output) else (Path(output),)


def run_recipe(path: Path, overrides: Sequence[str], *, discard: bool = False) -> dict[str, Any]:
    """Do all steps and write the report; returns ids, seconds and the summary.

    `discard` drops interrupted work that the recipe differs from. Raises the error of the
    first step that fails, with that step's exit code.
    """
    started_s = time.monotonic()
    recipe = load_recipe(path, overrides)
    stages = Stages(recipe, path=str(path))
    timings: dict[str, float] = {}
    for step in steps(stages):
        missing = [draft for draft in step.makes if stages.store.find(draft.id) is None]
        if not missing and all(output.exists() for output in step.outputs):
            log(f"{step.name}: made already: {', '.join(draft.id for draft in step.makes)}")
            timings[step.name] = 0.0
            continue
        log(f"{step.name}: making {', '.join(draft.label for draft in missing or step.makes)}")
        before_s = time.monotonic()
        flags = ("--discard",) if discard and step.name in ("train", "recover", "batch") else ()
        try:
            if step.recipe:
                spawn(step.name, step.command, step.recipe, _store_of(recipe))
            else:
                spawn(step.name, step.command, path, (*overrides, *flags))
        except StepError as error:
            if error.exit_code == GateError.exit_code:
                log(f"report: {_report(stages, timings)}")
            raise
        timings[step.name] = time.monotonic() - before_s
        log(f"{step.name}: done in {timings[step.name]:.1f} s")
    from tunesmith.report import summary

    report = _report(stages, timings)
    return {
        "name": recipe.name,
        "ids": {
            draft.label: draft.id
            for step in steps(stages)
            for draft in step.makes
            if stages.store.find(draft.id)
        },
        "seconds": timings | {"total": time.monotonic() - started_s},
        "summary": summary(stages),
        "report": str(report),
    }


def show(result: dict[str, Any]) -> Any:
    """The table that ends a run."""
    from rich.console import Group

    table = result["summary"]
    seconds = " · ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    return Group(
        make_table(result["name"], table["columns"], table["rows"]),
        seconds,
        f"report: {result['report']}",
    )


def _report(stages: Stages, timings: dict[str, float]) -> Path:
    from tunesmith.report import write_report

    return write_report(stages, stages.store.folder / "reports" / stages.recipe.name, timings)


def _store_of(recipe: Recipe) -> tuple[str, ...]:
    """The overrides with which another recipe uses the same store."""
    store = recipe.store
    ledger = (f"store.ledger={store.ledger}",) if store.ledger else ()
    return (f"store.folder={store.folder}", *ledger)


def spawn(
    name: str, words: Sequence[str], path: Path, arguments: Sequence[str] = (), shown: bool = True
) -> None:
    """Run one command of this CLI, pass a stop on to it, and raise on any other end than 0."""
    command = [sys.executable, "-m", "tunesmith.cli", *words, str(path), *arguments]
    # Results of a step are not the run's result: its table goes where progress goes.
    process = subprocess.Popen(
        command,
        stdout=sys.stderr if shown else subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal's Ctrl-C reached the child too; SIGTERM reached only us.
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code == 0:
        return
    if code == _INTERRUPTED:
        raise WorkInterrupted(f"{name} was interrupted; run the same command again to resume")
    error = StepError(f"{name} ended with exit code {code}; its message is above")
    error.exit_code = code if code > 0 else 1
    raise error


def end_with_parent() -> None:
    """A step whose run was killed stops too, and keeps what it has for the next attempt."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StepError(TunesmithError):
    """A step failed; carries the step's own exit code."""
