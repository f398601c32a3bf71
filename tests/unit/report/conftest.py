"""A recipe whose every artifact is made, with figures as a small machine gives them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import Recipe
from tunesmith.ledger import Draft, Store, Work
from tunesmith.pipeline import Stages

VARIANTS = {  # loss against the base's, MiB, output tokens/s
    "base": (1.0, 13.2, 0),
    "tuned": (0.66, 13.2, 2400),
    "w8a8-int8": (0.662, 8.1, 2900),
    "w4a16": (0.671, 6.3, 2100),
}


ERRORS = {"w8a8-int8": 0.01, "w4a16": 0.11}
"""Relative errors of weights."""


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    """Nothing made yet."""
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(int(13.2 * 2**20)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    recipe = Recipe.model_validate(
        {
            "name": "quickstart",
            "store": {"folder": tmp_path / "store"},
            "model": {"base": str(model)},
            "data": {"train": str(rows)},
            "train": {"method": "lora"},
            "quantize": {"scheme": ["w8a8-int8", "w4a16"]},
            "evaluate": {},
            "bench": {"requests": 128, "request_rate": 16},
            "price": {"gpu_hour_usd": 0.10},
        }
    )
    return Stages(recipe, Store.of(recipe), "configs/quickstart.yaml")


@pytest.fixture
def make() -> Callable[[Stages], None]:
    return make_all


@pytest.fixture
def make_bench() -> Callable[..., None]:
    return _bench


def make_all(stages: Stages) -> None:
    """Every artifact of the recipe."""
    stages.made(stages.base)
    _write(stages, stages.dataset, lambda work: None)
    _write(stages, stages.trained, _training)
    for name in ("tuned", "w8a8-int8", "w4a16"):
        _write(stages, stages.variants[name], lambda work, name=name: _weights(work, name))
    for name in VARIANTS:
        _write(stages, stages.evaluation(name), lambda work, name=name: _evaluation(work, name))
    for name in ("w8a8-int8", "w4a16"):
        _fidelity(stages, name)
    for mode in ("batch", "serve"):
        _bench(stages, mode)


def _write(stages: Stages, draft: Draft, fill: Callable[[Work], None]) -> None:
    with stages.store.write(draft, stages.recipe) as work:
        fill(work)


def _training(work: Work) -> None:
    source = random.Random(1)
    lines = []
    for step in range(0, 241, 10):
        loss = 2.1 + 1.9 / (1 + step / 25) + source.gauss(0, 0.05)
        if step:
            lines.append({"step": step, "loss": loss, "learning_rate": 1e-3, "elapsed_s": step / 4})
        if step % 60 == 0:
            lines.append({"step": step, "eval_loss": loss + 0.06})
    _jsonl(work.out / "metrics.jsonl", lines)
    (work.out / "adapter_model.safetensors").write_bytes(bytes(700_000))


def _weights(work: Work, name: str) -> None:
    size_bytes = int(VARIANTS[name][1] * 2**20)
    (work.out / "model.safetensors").write_bytes(bytes(size_bytes))
    if name in ERRORS:
        source = random.Random(name)
        work.metrics |= {
            "bytes": size_bytes,
            "parent_bytes": int(VARIANTS["tuned"][1] * 2**20),
            "layers": {
                f"model.layers.{block}.mlp.{kind}_proj": {
                    "error": ERRORS[name] * source.uniform(0.9, 1.2),
                    "worst_row": ERRORS[name] * source.uniform(1.4, 2.0),
                }
                for block in range(12)
                for kind in ("down", "gate", "up")
            },
        }


def _fidelity(stages: Stages, name: str) -> None:
    def around(value: float, part: float = 0.1) -> dict[str, float]:
        return {"value": value, "low": value - part * value, "high": value + part * value}

    error = ERRORS[name]
    engine = {"load_s": 2.4, "loaded_bytes": 12 << 20, "peak_bytes": 900 << 20, "kernels": ["K"]}
    speed = {"requests": 64, "parent_tokens_per_s": around(2000.0)}
    metrics = {
        "loads": True,
        "golden": {"asked": 4, "answered": 4, "by_parent": 4},
        "total": {
            "loss_increase": around(error / 10),
            "kl": around(error / 50),
            "flipped": around(error / 3),
            "flipped_answers": around(4 * error),
            "chrf_change": around(-0.4),
        },
        "calibration": None,
        "speed": {
            "batch_1": speed | {"change": around(0.2)},
            "saturation": speed | {"change": around(-0.1)},
        },
        "engine": engine,
        "parent_engine": engine,
    }
    _write(stages, stages.fidelity(name), lambda work: work.metrics.update(metrics))


def _evaluation(work: Work, name: str) -> None:
    """200 rows that are as hard for one model as for another, but for a little."""
    shared, own = random.Random(2), random.Random(name)
    rows = []
    for index in range(200):
        tokens, hardness = shared.randint(6, 30), shared.gammavariate(12, 0.3)
        factor = VARIANTS[name][0] + own.gauss(0, 0.004)
        rows.append(
            {
                "id": f"row-{index}",
                "completion_loss_sum_nats": tokens * hardness * factor,
                "completion_tokens": tokens,
                "answer": "a",
                "reference": "b",
                "chrf": max(0.0, min(100.0, 34 / factor**0.8 + shared.gauss(0, 9))),
            }
        )
    _jsonl(work.out / "rows.jsonl", rows)
    work.metrics |= {"variant": name, "rows": 200}


def _bench(stages: Stages, mode: str, **changes: dict[str, Any]) -> None:
    """`changes` replace figures of a variant."""
    variants = {
        name: {
            "figures": _figures(mode, name) | changes.get(name, {}),
            "samples": _samples(name),
        }
        for name in ("tuned", "w8a8-int8", "w4a16")
    }

    def fill(work: Work) -> None:
        (work.out / "bench.json").write_text(json.dumps({"mode": mode, "variants": variants}))
        work.metrics["variants"] = {name: entry["figures"] for name, entry in variants.items()}

    _write(stages, stages.bench(mode), fill)


def _figures(mode: str, name: str) -> dict[str, Any]:
    rate = float(VARIANTS[name][2])

    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.94 * value, "high": 1.07 * value}

    found = {
        "valid": True,
        "faults": [],
        "requests": 128,
        "output_tokens": 32,
        "output_tokens_per_s": around(rate),
        "ttft_ms": {"p50": around(60_000 / rate), "p95": around(180_000 / rate)},
        "tpot_ms": {"p50": around(20_000 / rate), "p95": around(31_000 / rate)},
        "usd_per_million_input_tokens": 2.4 / rate,
        "usd_per_million_output_tokens": 20 / rate,
    }
    if mode == "batch":
        return found | {"concurrency": 32}
    return found | {"goodput": {"share": 0.97, "requests_per_s": 14.2, "slo_kept": True}}


def _samples(name: str) -> list[dict[str, Any]]:
    source, rate = random.Random(name), VARIANTS[name][2]
    samples = []
    for index in range(128):
        first_s = index / 16 + source.gammavariate(3, 20 / rate)
        each_s = source.gammavariate(20, 1 / rate)
        samples.append(
            {
                "index": index,
                "intended_s": index / 16,
                "piece_s": [first_s + each_s * n for n in range(32)],
                "piece_tokens": [1] * 32,
                "output_tokens": 32,
                "error": "gone" if index == 5 else None,
            }
        )
    return samples


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
