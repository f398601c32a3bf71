"""Small random chat models of several families, and recipes over rows written to a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.config import Recipe
from tunesmith.pipeline import Stages
from tunesmith.train.tokenizer import learn_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {at} plus {at}?" + " Please." * (at % 9)},
            {"role": "assistant", "content": f"{at} plus {at} is {2 * at}. " * (1 + at % 7)},
        ]
    }
    for at in range(64)
]
TEXTS = [message["content"] for row in ROWS for message in row["messages"]]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 16, "final_logit_softcapping": 3.0},
    ),
    "mistral": ("mistral", {"sliding_window": 16}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
}
"""Name → model type and what differs from SHAPE: soft caps, biases, windows, fused projections."""


def random_model(family: str) -> Any:
    model_type, changes = FAMILIES[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SHAPE | changes))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model in float32, with a tokenizer learned from the rows."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = learn_tokenizer(TEXTS, 512, 128)

    def make(family: str) -> Path:
        path = folder / family
        if not path.exists():
            random_model(family).float().save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def recipe_of(tmp_path: Path, base_of: Callable[[str], Path]) -> Callable[..., Recipe]:
    """A recipe over the rows, with keys of `train` given and of other sections nested."""

    def make(base: str | Path | None = "llama", store: str = "store", **train: Any) -> Recipe:
        sections = {name: train.pop(name, {}) for name in ("model", "data")}
        path = tmp_path / "rows.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        if base in FAMILIES:
            base = base_of(base)
        defaults = {"method": "lora", "learning_rate": 5e-3, "logging_steps": 1, "max_steps": 6}
        return Recipe.model_validate(
            {
                "name": "test",
                "store": {"folder": tmp_path / store},
                "model": {"base": base and str(base), "dtype": "float32"} | sections["model"],
                "data": {"train": str(path), "max_length": 128, "evaluation_fraction": 0.2}
                | sections["data"],
                "train": defaults | train,
            }
        )

    return make


@pytest.fixture
def stages_of(recipe_of: Callable[..., Recipe]) -> Callable[..., Stages]:
    def make(*arguments: Any, **keywords: Any) -> Stages:
        return Stages(recipe_of(*arguments, **keywords))

    return make
