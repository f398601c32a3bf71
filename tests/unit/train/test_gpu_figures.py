"""The GPU report compares figures with goals and leaves nothing out in silence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("train_gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _figures(tokens_per_s: float, memory_gib: float, peer: Any = None) -> dict[str, Any]:
    return {
        "tokens_per_s": {"median": tokens_per_s, "lowest": 1.0, "highest": 2.0},
        "mfu": tokens_per_s / 30_000,
        "useful_tflops_per_s": 400.0,
        "share_of_ceiling": 0.5,
        "peak_memory_gib": memory_gib,
        "warmup_s": 1.0,
        "peer": peer,
    }


def test_each_goal_is_about_its_runs(gpu: Any) -> None:
    peer = {"speed_ratio": {"median": 1.4}, "memory_ratio": 0.7}
    values = gpu.goal_values(
        {
            "LoRA": _figures(12_000, 80),
            "LoRA, compiled": _figures(15_000, 60),
            "LoRA on FP8, compiled": _figures(21_000, 50),
            "LoRA, checkpointed": _figures(10_000, 20),
            "QLoRA, checkpointed": _figures(7_000, 9),
            "LoRA beside TRL": _figures(14_000, 60, peer),
        }
    )
    assert values == {
        "LoRA, tokens/s": 15_000,
        "LoRA, MFU": 0.5,
        "LoRA, tokens/s (stretch)": 15_000,
        "LoRA on FP8, tokens/s (stretch)": 21_000,
        "QLoRA, speed over LoRA's": 0.7,
        "QLoRA, memory over LoRA's": 0.45,
        "speed over TRL's": 1.4,
        "memory over TRL's": 0.7,
    }
    verdicts = {goal.name: goal.says(values[goal.name], judged=True) for goal in gpu.GOALS}
    assert [name for name, verdict in verdicts.items() if verdict == "missed"] == [
        "LoRA, tokens/s (stretch)",
        "QLoRA, speed over LoRA's",
    ]
    assert set(values) == {goal.name for goal in gpu.GOALS}


def test_what_did_not_run_is_not_met(gpu: Any) -> None:
    values = gpu.goal_values({"LoRA": None})
    assert set(values.values()) == {None}
    assert {goal.says(None, judged=True) for goal in gpu.GOALS} == {"not measured"}
    assert gpu.GOALS[0].says(99_999.0, judged=False) == "not judged"


def test_the_page_names_what_was_left_out(gpu: Any) -> None:
    report = {
        "shape": "tiny",
        "length": 64,
        "sequences_per_pass": 2,
        "command": "scripts/gpu",
        "commit": "abc",
        "machine": {"gpus": [], "cpu": "a processor", "torch": "2"},
        "goals": [
            {"name": "g", "at_least": 13_000, "at_most": None, "value": 5.0, "verdict": "missed"}
        ],
        "attention": {"flash_attention": None},
        "runs": [
            {"name": "LoRA", "figures": _figures(1234.0, 0.5)},
            {"name": "QLoRA", "left_out": "bitsandbytes is not installed"},
        ],
    }
    page = gpu.markdown(report)
    assert "| g | ≥ 13,000 | 5 | missed |" in page
    assert "| QLoRA | bitsandbytes is not installed |" in page
    assert "| LoRA | 1,234 | 400 | 4.1% | 50.0% | 0.50 | 1.0 |" in page
    assert "no GPU: a processor" in page
