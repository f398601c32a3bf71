"""What leaves the store runs without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.quantization_config import CompressedTensorsConfig
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run


def test_an_exported_checkpoint_runs_when_store_and_parent_are_gone(
    tmp_path: Path, model_of: Callable[..., Path], stages_of: Callable[..., Stages]
) -> None:
    parent = model_of(tmp_path / "parent", "llama")
    stages = stages_of(tmp_path / "made", parent, quantize={"scheme": "fp8-dynamic"})
    made = run(stages)["checkpoints"]["fp8-dynamic"]
    target = tmp_path / "delivered"
    store = str(stages.store.folder)
    done = CliRunner().invoke(app, ["export", made["id"], "--to", str(target), "--store", store])
    assert done.exit_code == 0 and done.stdout.strip() == str(target)
    shutil.rmtree(stages.store.folder)
    shutil.rmtree(parent)
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 plus 2?"}], tokenize=False
    )
    assert text.startswith("<|im_start|>user")
    assert GenerationConfig.from_pretrained(target).eos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(
        target, local_files_only=True, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    logits_BSV = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    assert bool(logits_BSV.isfinite().all())
