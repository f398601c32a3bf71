"""What quantizing would take, before it is done."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.cli import plan
from tunesmith.config.schema.quantize import Quantize
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run
from tunesmith.quantize.plan import Work
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.skeleton import Skeleton


def test_a_plan_counts_the_texts_and_says_what_is_held(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]
) -> None:
    section = {"scheme": ("w8a8-int8", "fp8-dynamic"), "calibration_rows": 8}
    stages = stages_of(tmp_path, llama, quantize=section)
    planned = plan.run(stages, "this")
    fitted, rounded = planned["quantizing"]
    made = run(stages)["checkpoints"]["w8a8-int8"]
    assert fitted["calibration_tokens"] == made["calibration"]["tokens"]
    assert rounded["calibration_tokens"] is None
    assert fitted["layers"] == 2 and fitted["held"] == "one layer"
    assert fitted["peak_gib"] == pytest.approx(sum(fitted["parts_gib"].values()), abs=2e-4)
    assert fitted["hours"] > rounded["hours"] > 0
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(plan.show(planned))
    assert "fp8-dynamic" in console.export_text()


WAYS: dict[str, dict[str, Any]] = {
    "gptq": {"algorithm": "gptq"},
    "rtn": {"algorithm": "rtn"},
    "rotated": {"rotation": "spinquant"},
}


def test_memory_does_not_grow_with_depth_unless_the_whole_model_is_held(
    tmp_path: Path, model_of: Callable[..., Path]
) -> None:
    peaks = {}
    for depth in (2, 8):
        folder = model_of(tmp_path / str(depth), "llama", num_hidden_layers=depth)
        skeleton = Skeleton.of(folder, "bfloat16", False)
        for way, keys in WAYS.items():
            asked = Quantize(scheme="w4a16", **keys)
            work = Work.of(skeleton, Method.of(asked, "w4a16"), (64, 32))
            peaks[way, depth] = sum(work.parts_bytes().values())
            layer_bytes = work.layer_bytes
    for way in ("gptq", "rtn"):
        assert peaks[way, 2] == peaks[way, 8]
    assert peaks["rotated", 8] - peaks["rotated", 2] == 6 * layer_bytes
