"""Whether `scheme: auto` picks what trying everything would pick, on models of three widths.

python tests/benchmarks/quantize_search.py --out docs/measured/quantize-search-cpu.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit, machine

from tunesmith.config import GateError, Recipe
from tunesmith.config.load import dump_recipe
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages
from tunesmith.pipeline.run import run_recipe
from tunesmith.pipeline.verdict import summary_of
from tunesmith.quantize.command import run

WIDTHS = (128, 256, 384)
CANDIDATES = ("w4a16", "w8a8-int8")
BUDGET, STRICT_SHARE = 0.01, 0.9
"""Largest increase of the loss; and one that the smallest candidate does not keep, as a share of
the upper bound of what that costs."""


def main() -> None:
    """Measure, write, and end with 3 when a search differs from trying everything."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for width in options.widths:
            found[str(width)] = _compare(width, Path(scratch), options)
            print(width, json.dumps(found[str(width)]), file=sys.stderr, flush=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "widths": found,
        "agree": all(case["agrees"] for cases in found.values() for case in cases["budgets"]),
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if report["agree"] else 3)


def _compare(width: int, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model: everything tried once, then the searches, each in a store of its own."""
    trained = _stages(width, scratch / str(width), options.steps)
    everything = _with(trained, CANDIDATES, None)
    path = scratch / f"{width}.yaml"
    path.write_text(dump_recipe(everything.recipe), encoding="utf-8")
    run_recipe(path, ())
    measured = {
        name: {
            "bytes": everything.made(everything.quantized(name)).manifest.metrics["bytes"],
            "loss_increase": entry["metrics"]["total"]["loss_increase"],
        }
        for name, entry in summary_of(everything).items()
    }
    smallest = min(measured.values(), key=lambda entry: entry["bytes"])
    strict = max(0.0, STRICT_SHARE * smallest["loss_increase"]["high"])
    return {
        "candidates": measured,
        "budgets": [_search(trained, measured, budget) for budget in (BUDGET, strict)],
    }


def _search(trained: Stages, measured: dict[str, Any], budget: float) -> dict[str, Any]:
    passing = {
        name: entry["bytes"]
        for name, entry in measured.items()
        if entry["loss_increase"]["high"] <= budget
    }
    expected = min(passing, key=lambda name: passing[name], default=None)
    started_s = time.monotonic()
    stages = _with(trained, "auto", budget)
    try:
        made = run(stages)["checkpoints"]["auto"]
    except GateError as error:
        return {"budget": budget, "expected": expected, "chosen": None, "said": str(error),
                "agrees": expected is None}  # fmt: skip
    # A mix is smaller than what passes as a whole, and has passed itself.
    is_smaller = expected is not None and made["bytes"] < passing[expected]
    return {
        "budget": budget,
        "expected": expected,
        "chosen": made["chosen"],
        "tried": made["search"],
        "reason": made["reason"],
        "seconds": round(time.monotonic() - started_s, 1),
        "agrees": made["chosen"] == expected or is_smaller,
    }


def _stages(width: int, folder: Path, steps: int) -> Stages:
    """A model that is pre-trained on the standard library."""
    recipe = Recipe.model_validate(
        {
            "name": f"width-{width}",
            "store": {"folder": folder},
            "model": {},
            "data": {"train": "builtin/stdlib", "format": "text", "max_length": 256},
            "train": {
                "method": "pretrain",
                "max_steps": steps,
                "learning_rate": 2e-3,
                "per_device_train_batch_size": 16,
                "architecture": {
                    "hidden_size": width,
                    "intermediate_size": 3 * width,
                    "num_hidden_layers": 4,
                    "max_position_embeddings": 512,
                },
            },
            "engine": {"kv_cache_gib": 0.25, "max_num_seqs": 16},
        }
    )
    return Stages(recipe, Store.of(recipe))


def _with(stages: Stages, scheme: Any, budget: float | None) -> Stages:
    quantize = {
        "scheme": scheme,
        "calibration_rows": 64,
        "verify_rows": 64,
        "max_loss_increase": budget,
        "max_kl": None,
        "search": {"candidates": CANDIDATES},
    }
    given = stages.recipe.model_dump(mode="json") | {"quantize": quantize}
    return Stages(Recipe.model_validate(given), stages.store)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of pre-training each model")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
