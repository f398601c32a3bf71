"""The loss is the plain one, whatever the architecture and however a step is divided."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sequences
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sequences import make_examples
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.config import ModelError
from tunesmith.config.schema.train import Train
from tunesmith.train.examples import Examples
from tunesmith.train.loop import Job, Trainer
from tunesmith.train.loss import TokenLoss, check_logits, collate
from tunesmith.train.sharding import shard
from tunesmith.train.sharding import whole as whole_tensor
from tunesmith.train.side import Layout

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_plain_one(family: str, base_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of(family)).eval()
    loss = TokenLoss(model, torch.float32)
    examples = make_examples(5)
    check_logits(loss, examples[0], CPU)
    plain = torch.zeros(())
    for example in examples:
        ids_1S = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        labels_S = ids_1S[0].masked_fill(~torch.from_numpy(example.learnt), -100)
        logits_SV = model(input_ids=ids_1S).logits[0]
        plain = plain + F.cross_entropy(logits_SV[:-1], labels_S[1:], reduction="sum")
    batch = collate(examples)
    padded = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum()
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=0.0)
    theirs, ours = (
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        for value in (plain, padded)
    )
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_full_logits_never_exist(
    family: str, is_frozen: bool, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of(family))
    model.get_input_embeddings().requires_grad_(not is_frozen)
    model.lm_head.requires_grad_(not is_frozen)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    batch = collate(make_examples(6))
    # Some objectives weigh each row by itself.
    weight_N = torch.rand(len(batch.targets_N))
    logits_SV = model(input_ids=batch.input_ids_BS, use_cache=False).logits.flatten(0, 1)
    chosen_NV = logits_SV.float()[batch.positions_N]
    whole = F.cross_entropy(chosen_NV, batch.targets_N, reduction="none") @ weight_N
    theirs = torch.autograd.grad(whole, weights)

    loss = TokenLoss(model, torch.float32)
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _layer, _inputs, output: made.append(output.numel()))
    monkeypatch.setattr("tunesmith.train.loss._LARGEST_LOGITS", 10 * 512 + 3)
    monkeypatch.setattr("tunesmith.train.loss._FROZEN_LOGITS", 10 * 512 + 3)
    monkeypatch.setattr("tunesmith.train.loss._FEWEST_ROWS", {"cpu": 1})
    parts = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N) @ weight_N
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0.0)
    for one, other in zip(theirs, torch.autograd.grad(parts, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # A frozen head computes each logit once.
    times = 1 if is_frozen else 2
    assert max(made) == 10 * 512 and len(made) == times * -(-len(batch.targets_N) // 10)
    with torch.no_grad():
        again = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N) @ weight_N
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=0.0)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = CONFIG_MAPPING["bert"](
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, initializer_range=0.5,
    )  # fmt: skip
    loss = TokenLoss(AutoModelForCausalLM.from_config(config), torch.float32)
    with pytest.raises(ModelError, match="looks at later tokens"):
        check_logits(loss, make_examples(1)[0], CPU)


def gradients(
    folder: Path, accelerator: Any, size: int, accumulation: int, *, sharded: bool = False
) -> dict[str, Any]:
    """The gradient of each of two steps, the second one over a part of a global batch."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, Any] = {}
    settings = Train(
        method="full",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-9,
        max_grad_norm=0.0,
        warmup_steps=0,
        optim="adamw_torch",
        lr_scheduler_type="constant",
    )
    examples = Examples(rows=make_examples(13))
    loss = TokenLoss(model, torch.float32)
    if sharded:
        shard(loss, accelerator)
    job = Job(loss, examples, examples, Layout(), settings, torch.float32, 1, folder)
    trainer = Trainer(job, accelerator)
    assert trainer.total_steps == 2
    zero_grad = trainer._optimizer.zero_grad

    def keep_and_zero() -> None:
        for name, weight in model.named_parameters():
            seen[f"{trainer.progress.step} {name}"] = whole_tensor(weight.grad).clone()
        zero_grad()

    trainer._optimizer.zero_grad = keep_and_zero
    for step in range(2):
        trainer._step(trainer._order.groups(step))
    return seen


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).norm() / left[name].norm()) for name in left)


@pytest.fixture(scope="module")
def whole(base_of: Callable[[str], Path]) -> dict[str, Any]:
    return gradients(base_of("llama"), Accelerator(cpu=True), 8, 1)


@pytest.mark.parametrize(("size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_a_step_does_not_depend_on_its_passes(
    size: int, accumulation: int, base_of: Callable[[str], Path], whole: dict[str, Any]
) -> None:
    if size * accumulation != 8:  # another global batch: the measure below must see it
        with pytest.raises(AssertionError):
            assert (
                largest_difference(
                    whole, gradients(base_of("llama"), Accelerator(cpu=True), size, accumulation)
                )
                < 1e-2
            )
        return
    divided = gradients(base_of("llama"), Accelerator(cpu=True), size, accumulation)
    assert largest_difference(whole, divided) < 1e-5


def test_two_ranks_make_the_same_step(
    base_of: Callable[[str], Path], whole: dict[str, Any], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, base_of("llama"), tmp_path / f"{rank}.pt"],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(sequences.__file__)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in range(2):
        for seen in torch.load(tmp_path / f"{rank}.pt"):
            assert largest_difference(whole, seen) < 1e-5


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = [
        gradients(Path(sys.argv[1]), accelerator, 2, 2, sharded=sharded)
        for sharded in (False, True)
    ]
    torch.save(found, sys.argv[2])
    accelerator.end_training()
