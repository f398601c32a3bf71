"""A small random chat model and a data set artifact, made without any download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from tunesmith.config import Recipe
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages

TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
ROWS = [
    {
        "id": f"row-{at}",
        "messages": [
            {"role": "user", "content": f"What is {at} plus {at}?"},
            {"role": "assistant", "content": f"{at} plus {at} is {2 * at}. " * (1 + at % 7)},
        ],
    }
    for at in range(60)
]


def make_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """Random weights in bfloat16, a tokenizer trained on the rows, a chat template."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**SHAPE | changes)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (message["content"] for row in ROWS for message in row["messages"]),
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_stages(folder: Path, base: Path, **sections: Any) -> Stages:
    """A recipe whose data set is made already: the first 48 rows to train, the rest held out."""
    folder.mkdir(parents=True, exist_ok=True)
    if "quantize" in sections:  # engines are started by the tests that are about them
        sections["quantize"] = {"verify_rows": 0, **sections["quantize"]}
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines))
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "store": {"folder": folder / "store"},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
            **sections,
            "model": {"base": str(base), **sections.get("model", {})},
        }
    )
    stages = Stages(recipe, Store.of(recipe))
    with stages.store.write(stages.dataset, recipe) as work:
        (work.out / "train.jsonl").write_text("".join(lines[:48]))
        (work.out / "evaluation.jsonl").write_text("".join(lines[48:]))
    return stages
