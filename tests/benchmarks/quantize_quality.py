"""What every quantization scheme costs in quality, and what calibrating on the own rows is worth.

On the quickstart's tuned model, judged with transformers (activations rounded as the scheme asks):
python tests/benchmarks/quantize_quality.py --out docs/measured/quantize-quality-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunesmith.config import load_recipe
from tunesmith.config.schemes import SCHEMES
from tunesmith.evaluate.heldout import hold_out
from tunesmith.ledger import describe_environment
from tunesmith.pipeline import Stages
from tunesmith.pipeline.rows import sample_rows
from tunesmith.quantize.command import run
from tunesmith.quantize.quality import compare as judge
from tunesmith.quantize.quality import open_model
from tunesmith.statistics import compare, ratio_of_sums

MOST_PERCENT = {
    "w8a8-int8": 0.3,
    "w4a16": 1.0,
    "fp8-dynamic": 0.5,
    "nvfp4a16": 1.0,
    "mxfp4a16": 1.5,
}
"""Largest increase of the loss against the tuned parent, for schemes as they are by default."""

CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in MOST_PERCENT},
    **{name: {} for name in SCHEMES},
    "w8a8-int8 smoothquant": {"smoothquant": 0.5},
    "w8a8-int8 rtn": {"algorithm": "rtn"},
    "fp8-dynamic gptq": {"algorithm": "gptq"},
    "fp8-static gptq": {"algorithm": "gptq"},
    "fp8-block gptq": {"algorithm": "gptq"},
    "w4a16 asymmetric": {"symmetric": False},
    "w4a16 groups of 32": {"group_size": 32},
    "w4a16 rtn": {"algorithm": "rtn"},
    "w4a16 awq": {"algorithm": "awq"},
    "w4a16 spinquant": {"rotation": "spinquant"},
    "w3a16 spinquant": {"rotation": "spinquant"},
    "w2a16 spinquant": {"rotation": "spinquant"},
    "nvfp4 rtn": {"algorithm": "rtn"},
    "nvfp4a16 rtn": {"algorithm": "rtn"},
    "mxfp4 rtn": {"algorithm": "rtn"},
    "mxfp4a16 rtn": {"algorithm": "rtn"},
}
"""Name, which begins with the scheme → further keys of `quantize`."""

CONFIDENCE, SEED = 0.95, 17


def main() -> None:
    """Make and judge the cases and write the figures; exit code 3 when one is out of bounds."""
    options = _options()
    base = _stages(options, {"scheme": "w4a16"})
    parent = base.made(base.tuned)
    held_out = _held_out(base, parent.root, options.rows)
    model = open_model(parent.root)
    figures: dict[str, Any] = {}
    for name in options.only or list(CASES):
        keys = {"scheme": name.split()[0], **CASES[name]}
        own, figure = _measure(options, keys, model, held_out)
        if figure["calibration"] and name in options.generic:
            other, generic = _measure(
                options, keys | {"calibration_text": "generic"}, model, held_out
            )
            figure["generic"] = generic
            figure["own_minus_generic"] = _difference(own, other)
        figures[name] = figure
        print(f"{name}: {json.dumps(figure)}", file=sys.stderr, flush=True)
        _write(options, figures, len(held_out))
    missed = [
        name
        for name, most in MOST_PERCENT.items()
        if name in figures and figures[name]["loss_percent"]["value"] > most
    ]
    print(f"out of bounds: {', '.join(missed)}" if missed else "all within bounds")
    sys.exit(3 if missed else 0)


def _stages(options: argparse.Namespace, keys: dict[str, Any]) -> Stages:
    overrides = [f"quantize.{key}={json.dumps(value)}" for key, value in keys.items()]
    recipe = load_recipe(
        options.recipe, [f"store.folder={options.store}", "quantize.verify_rows=0", *overrides]
    )
    return Stages(recipe, path=str(options.recipe))


def _held_out(stages: Stages, model: Path, count: int) -> list[Any]:
    data = stages.recipe.data
    assert data
    rows = sample_rows(stages.made(stages.dataset).root / "evaluation.jsonl", count, SEED)
    return hold_out(
        rows,
        model,
        chat_template=None,
        max_length=data.max_length,
        max_model_len=stages.recipe.engine.max_model_len or data.max_length,
        max_tokens=1,
    ).items


def _measure(
    options: argparse.Namespace, keys: dict[str, Any], parent: Any, items: list[Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one checkpoint and its figures."""
    started_s = time.monotonic()
    made = run(_stages(options, keys))["checkpoints"][keys["scheme"]]
    made_s = time.monotonic() - started_s
    sequences = [(one.input_ids, one.learnt) for item in items for one in item.scored]
    ids = [item.id for item in items for _ in item.scored]
    found = list(judge(open_model(Path(made["folder"])), parent, sequences))
    ours = [
        {
            "id": f"{row_id} {at}",
            "completion_loss_sum_nats": one.loss_sum_nats,
            "completion_tokens": one.tokens,
            "kl": one.kl_sum_nats,
        }
        for at, (row_id, one) in enumerate(zip(ids, found, strict=True))
    ]
    theirs = [
        row | {"completion_loss_sum_nats": one.parent_loss_sum_nats}
        for row, one in zip(ours, found, strict=True)
    ]
    tokens = [float(one.tokens) for one in found]

    def mean(values: list[float]) -> dict[str, float]:
        return ratio_of_sums(values, tokens, confidence=CONFIDENCE, seed=SEED)._asdict()

    compared = compare(ours, theirs, "completion_loss", CONFIDENCE, SEED)
    assert compared and compared.relative
    return ours, {
        "keys": keys,
        "loss_percent": {key: 100 * part for key, part in compared.relative._asdict().items()},
        "kl_nats_per_token": mean([one.kl_sum_nats for one in found]),
        "flipped_share": mean([float(one.flipped) for one in found]),
        "bytes_of_parent": made["bytes"] / made["parent_bytes"],
        "calibration": made["calibration"],
        "quantize_s": round(made_s, 1),
        "reused": made["reused"],
        "id": made["id"],
    }


def _difference(own: list[dict[str, Any]], generic: list[dict[str, Any]]) -> dict[str, Any]:
    """By how much less the own rows cost: below zero where they are worth something."""
    compared = compare(own, generic, "completion_loss", CONFIDENCE, SEED)
    assert compared and compared.relative
    tokens = [float(row["completion_tokens"]) for row in own]
    kl = [ours["kl"] - theirs["kl"] for ours, theirs in zip(own, generic, strict=True)]
    return {
        "loss_percent": {key: 100 * part for key, part in compared.relative._asdict().items()},
        "kl_nats_per_token": ratio_of_sums(kl, tokens, confidence=CONFIDENCE, seed=SEED)._asdict(),
    }


def _write(options: argparse.Namespace, figures: dict[str, Any], rows: int) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "environment": describe_environment(),
        "rows": rows,
        "confidence": CONFIDENCE,
        "bounds_percent": MOST_PERCENT,
        "figures": figures,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--store", type=Path, default=Path(".tunesmith"))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--generic", nargs="*", default=list(CASES), help="also on other text")
    parser.add_argument("--out", type=Path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return parser.parse_args()


if __name__ == "__main__":
    main()
