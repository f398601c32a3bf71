"""Rollouts of faulty arms are taken back, and those of equal arms are not.

python tests/benchmarks/rollout.py --out docs/measured/rollout-cpu.json

Gateway, upstreams and clients share one process: nothing here is a measurement of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmark import describe, finish

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from rolling import Arm, play  # noqa: E402

from tunesmith.config.schema.routes import Rollout  # noqa: E402

BOUND_S = 10.0
FAULTS: dict[str, dict[str, Any]] = {
    "30 % errors": {"error_rate": 0.3},
    "2x latency": {"slowness": 2.0},
    "wrong answers": {"is_wrong": True},
    "2x cost": {"tokens": 12},
}


def main() -> None:
    """Play all of them, and end with 3 when one was decided wrongly or late."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each fault")
    parser.add_argument("--equal", type=int, default=20, help="rollouts of equal arms")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--jobs", type=int, default=2, help="rollouts at once, each on a core")
    parser.add_argument("--longest-s", type=float, default=120.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    faulty = [
        (seed, name, options.longest_s)
        for name in options.faults
        for seed in range(options.repeats)
    ]
    even = [(1000 + seed, None, options.longest_s) for seed in range(options.equal)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        runs = pool.starmap(_one, [*faulty, *even], chunksize=1)
    equal = runs[len(faulty) :]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.faults}
    for (_, name, _), run in zip(faulty, runs, strict=False):
        found[name].append(run)
    figures = {
        "plan": Rollout().model_dump(mode="json"),
        "bound_s": BOUND_S,
        "faults": {name: _summary(runs) | {"runs": runs} for name, runs in found.items()},
        "equal": _summary(equal)
        | {"false_rollbacks": sum(run["state"] == "rolled back" for run in equal), "runs": equal},
    }
    finish(options.out, describe(parser, figures), _faults(found, equal))


def _one(seed: int, fault: str | None, longest_s: float) -> dict[str, Any]:
    more = FAULTS[fault] if fault else {}
    # Twice the time has to be twice the time: what this process adds to both arms is small to it.
    seconds, clients = (0.1, 20) if "slowness" in more else (0.02, 12)
    old, new = Arm("old", seconds), Arm("new", seconds, **more)
    playing = play(old, new, Rollout(), longest_s=longest_s, clients=clients, seed=seed)
    outcome = asyncio.run(playing)
    last = outcome.decisions[-1]
    return {
        "state": outcome.rollout.state,
        "reason": last["reason"],
        "share_percent": 100 * outcome.rollout.plan.shares[last["step"]],
        "requests": outcome.requests,
        "requests_of_the_new_arm": last["evidence"]["requests"],
        "failed": outcome.failed,
        "seconds": round(outcome.seconds, 2),
        "after_minimum_s": None
        if outcome.after_minimum_s is None
        else round(outcome.after_minimum_s, 2),
        "replayed": all(one["replay"] == "the same" for one in outcome.decisions),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    states = [run["state"] for run in runs]
    late = [run["after_minimum_s"] or 0.0 for run in runs] or [0.0]
    return {
        "states": {state: states.count(state) for state in sorted(set(states))},
        "after_minimum_s": {"median": statistics.median(late), "longest": max(late)},
    }


def _faults(found: dict[str, list[dict[str, Any]]], equal: list[dict[str, Any]]) -> list[str]:
    wrong = [
        f"{name}: {run}"
        for name, runs in found.items()
        for run in runs
        # Wrong answers may be found before either arm has had its smallest number of requests.
        if run["state"] != "rolled back" or (run["after_minimum_s"] or 0.0) > BOUND_S
    ]
    wrong += [f"equal arms: {run}" for run in equal if run["state"] == "rolled back"]
    every = [run for runs in (*found.values(), equal) for run in runs]
    return wrong + [f"another decision on replay: {run}" for run in every if not run["replayed"]]


if __name__ == "__main__":
    main()
