"""Free pages of the heap go back to the system, in each layer, once there are many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.train import heap as heaps
from tunesmith.train.heap import Heap, keep_small, loose_bytes

MIB = 2**20


def blocks(count: int) -> list[bytearray]:
    """Touched blocks on the heap that are too small to be returned by themselves."""
    return [bytearray(b"x" * 65536) for _ in range(count)]


@pytest.fixture
def heap() -> Heap:
    found = Heap.find()
    if found is None:
        pytest.skip("no glibc 2.33 or later")
    found._library.malloc_trim(0)
    found._least = found._beside_blocks()
    return found


def test_many_free_pages_are_given_back_and_few_are_kept(heap: Heap) -> None:
    count = 4 * loose_bytes(heaps._resident_bytes()) // 65536
    held = blocks(count)
    full = heaps._resident_bytes()
    heap.tidy()
    assert heaps._resident_bytes() > full - 8 * MIB, "what is in use stays"
    stays = held[::2]  # one stays beside each free one: no free block is large or at the end
    held.clear()
    assert heaps._resident_bytes() > full - 8 * MIB
    heap.tidy()
    given_back = full - heaps._resident_bytes()
    assert given_back == pytest.approx(len(stays) * 65536, rel=0.25)
    few = blocks(4)
    before = heaps._resident_bytes()
    del few
    heap.tidy()
    assert heaps._resident_bytes() > before - MIB


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_tidies_forward_and_backward_and_computes_the_same(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
    )  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids_BS = torch.arange(32).reshape(2, 16)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids_BS, use_cache=False).logits.square().mean().backward()
        found: torch.Tensor = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        return found

    model.train()
    alone, tidied = gradient(), []
    monkeypatch.setattr(Heap, "tidy", lambda _self: tidied.append(1))
    keep_small(model)
    assert torch.equal(gradient(), alone)
    assert len(tidied) >= 6
    tidied.clear()
    with torch.no_grad():
        model(input_ids=ids_BS, use_cache=False)
    assert len(tidied) == 3


def test_a_model_without_a_list_of_layers_trains_as_it_is() -> None:
    class Odd(torch.nn.Linear):
        config = LlamaConfig(num_hidden_layers=7)

        def get_decoder(self) -> torch.nn.Module:
            return self

    model = Odd(2, 2)
    keep_small(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
