"""Packed rows see themselves alone, on every architecture that packing is not refused for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sequences import make_examples
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.config import ModelError
from tunesmith.pipeline import Stages
from tunesmith.train.batches import Groups
from tunesmith.train.examples import Example
from tunesmith.train.loss import TokenLoss, collate, keep_documents_apart
from tunesmith.train.ranks import join
from tunesmith.train.stage import train_stage

CPU = torch.device("cpu")
STATES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "mamba": {"state_size": 8, "hidden_size": 64, "num_hidden_layers": 2},
    "llama4_text": {"attention_chunk_size": 16, "num_local_experts": 2, "head_dim": 16},
}
"""Sinks beside attention, a state that runs over all tokens, and attention in chunks."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi", "phi3"])
def test_packed_logits_are_those_of_each_row_alone(
    family: str, base_of: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of(family)).eval()
    loss, rows = TokenLoss(model, torch.float32), make_examples(9)
    alone = [loss.logits(collate([row])) for row in rows]
    targets = collate(rows)
    padded = loss(targets.input_ids_BS, targets.positions_N, targets.targets_N)
    theirs = torch.autograd.grad(padded.sum(), list(model.parameters()), allow_unused=True)

    assert keep_documents_apart(loss, rows, CPU) is None
    batch = collate(rows, as_documents=True)
    together = loss.logits(batch)
    assert (together - torch.cat(alone)).abs().max() <= 1e-5
    packed = loss(
        batch.input_ids_BS, batch.positions_N, batch.targets_N, batch.bounds, batch.longest
    )
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(packed.sum(), list(model.parameters()), allow_unused=True)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    other = Example((rows[0].input_ids + 7) % 512, rows[0].learnt)
    changed = loss.logits(collate([other, *rows[1:]], as_documents=True))
    first = int(rows[0].learnt.sum())
    assert torch.equal(changed[first:], together[first:])
    assert not torch.equal(changed[:first], together[:first])


@pytest.mark.parametrize("kind", STATES)
def test_a_model_that_would_mix_rows_is_found_out(kind: str) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape | STATES[kind]))
    loss, rows = TokenLoss(model, torch.float32), make_examples(3)
    before = loss.all_logits(collate(rows[:1]).input_ids_BS)
    fault = keep_documents_apart(loss, rows, CPU)
    assert fault
    assert torch.equal(loss.all_logits(collate(rows[:1]).input_ids_BS), before)


def test_packing_trains_the_same_rows_in_fewer_passes(stages_of: Callable[..., Stages]) -> None:
    settings: dict[str, Any] = {"max_steps": None, "num_train_epochs": 2}
    plain = train_stage(
        stages_of(store="plain", per_device_train_batch_size=64, **settings), join()
    ).manifest.metrics
    stages = stages_of(store="packed", per_device_train_batch_size=64, packing=True, **settings)
    packed = train_stage(stages, join()).manifest.metrics
    assert packed["steps"] == plain["steps"] == 2
    for key in ("eval_loss_before", "eval_loss_after", "final_loss"):
        assert packed[key] == pytest.approx(plain[key], rel=1e-5), key
    assert packed["supervised_tokens_seen"] == plain["supervised_tokens_seen"]
    assert packed["fill"] > plain["fill"]


def test_an_unsafe_packing_is_refused(
    stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an attention that does not look at the bounds of documents."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        repeated = [part.repeat_interleave(2, 1) for part in (key, value)]
        found = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
        return found.transpose(1, 2), None

    monkeypatch.setattr("tunesmith.train.attention.attend", attend)
    with pytest.raises(ModelError, match=r"train.packing: a document's logits change"):
        train_stage(stages_of(packing=True), join())


def test_blocks_are_full() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 1.2, 20_000), 8, 4096).astype(np.int64)
    groups = Groups.packed(lengths, 4096, seed=3)
    assert lengths.sum() / (len(groups) * 4096) >= 0.97
    assert groups.lengths.max() <= 4096
    assert sorted(groups.rows) == list(range(len(lengths)))
    sums = [lengths[groups.rows_of(np.array([at]))].sum() for at in range(0, len(groups), 97)]
    assert sums == groups.lengths[::97].tolist()
    assert (Groups.packed(lengths, 4096, seed=3).rows == groups.rows).all()
    assert (Groups.packed(lengths, 4096, seed=4).rows != groups.rows).any()
