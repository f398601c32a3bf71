"""One recipe, other architectures: trained, merged, quantized, and answering in the real engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.batch.command import run as batch
from tunesmith.config import load_recipe
from tunesmith.config.schemes import has_amx
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run as quantize
from tunesmith.train.command import run as train

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "phi": ("phi", {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way(
    family: str,
    model_of: Callable[..., Path],
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    architecture, changes = FAMILIES[family]
    base = model_of(tmp_path / "base", architecture, **changes)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is 3 plus 3?"}\n' * 3)
    # vLLM runs Phi through transformers, which its INT8 kernel for CPUs with AMX does not take.
    scheme = "w4a16" if family == "phi" and has_amx() else "w8a8-int8"
    recipe = {
        "name": family,
        "model": {"base": str(base), "dtype": "bfloat16"},
        "data": {"train": "rows.jsonl", "max_length": 96, "evaluation_fraction": 0.2},
        "train": {"method": "lora", "lora": {"r": 4}, "max_steps": 8, "learning_rate": 1.0e-2},
        "quantize": {"scheme": scheme, "calibration_rows": 8, "verify_rows": 0},
        "engine": {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_gib": 0.1},
        "batch": {"input": "prompts.jsonl", "output": "answers.jsonl", "max_tokens": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    stages = Stages(load_recipe(Path("recipe.yaml")))
    trained = train(stages)["trained"]
    quantize(stages)
    batch(stages)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(0 < row["output_tokens"] <= 8 for row in answers)
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    made = stages.made(stages.batch()).manifest
    assert made.parents["model"] == stages.made(stages.quantized(scheme)).id
