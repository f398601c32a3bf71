"""Fifty steps of each method learn what they learnt when the curve was recorded.

`TUNESMITH_RECORD=1 scripts/test tests/integration/train/test_golden.py` records them again, for a
change that is meant to alter what a training does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.pipeline import Stages
from tunesmith.train import command

GOLDEN = Path(__file__).with_name("golden.json")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "pretrain": {
        "method": "pretrain", "architecture": SHAPE, "base": None,
        "data": {"train": "texts.jsonl", "format": "text", "max_length": 64},
    },
    "dpo": {
        "method": "lora", "learning_rate": 1e-3, "preference": {},
        "data": {"train": "pairs.jsonl", "format": "preference", "max_length": 64},
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_as_it_did(
    method: str,
    stages_of: Callable[..., Stages],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ({"text": f"{at} times {at} is {at * at}, and not {at + at}."} for at in range(300))
    Path("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    pairs = (
        {"prompt": f"{at} times {at}?", "chosen": f"It is {at * at}.", "rejected": f"Ask {at % 7}."}
        for at in range(60)
    )
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"max_steps": 50, "logging_steps": 5, "merge": False} | METHODS[method]
    result = command.run(stages_of(**settings))["trained"]
    lines = (Path(result["path"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    curve = {
        kind: [round(entry[kind], 5) for entry in entries if kind in entry]
        for kind in ("loss", "eval_loss")
    }
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("TUNESMITH_RECORD"):
        GOLDEN.write_text(json.dumps(known | {method: curve}, indent=1) + "\n", encoding="utf-8")
        return
    # Other processors round differently; what a step learns does not hang on that.
    for kind, losses in curve.items():
        assert losses == pytest.approx(known[method][kind], rel=0.01), kind
    assert curve["eval_loss"][-1] < 0.97 * curve["eval_loss"][0]
