"""Free pages of the heap go back to the system once more is held than was ever needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.train import heap as heaps
from tunesmith.train.heap import Heap, keep_small, loose_bytes

MIB = 2**20

_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def halved(count: int) -> list[bytearray]:
    """So many blocks, every second of them free: none of these is large or at the end."""
    made = blocks(2 * count)
    return made[::2]


def test_free_pages_stay_until_more_is_held_than_was_ever_needed(heap: Heap) -> None:
    heap.tidy()
    needed = blocks(3000)
    heap.tidy()
    full = heaps._resident_bytes()
    stays = needed[::2]
    needed.clear()
    heap.tidy()
    assert heaps._resident_bytes() > full - 8 * MIB, "the peak was as high: the pages stay"
    more = halved(loose_bytes(full) // 65536 + 3000)
    before = heaps._resident_bytes()
    heap.tidy()
    given_back = before - heaps._resident_bytes()
    assert given_back > 0.75 * 65536 * len(more)
    assert heaps._resident_bytes() < full + loose_bytes(full) + 65536 * len(more)
    del stays


def test_few_free_pages_stay(heap: Heap) -> None:
    few = blocks(4)
    before = heaps._resident_bytes()
    del few
    heap.tidy()
    assert heaps._resident_bytes() > before - MIB


@pytest.mark.skipif(
    condition="[never]" in (_PAGES.read_text() if _PAGES.exists() else "[never]"),
    reason="this system has no large pages",
)
def test_tensors_are_made_of_large_pages_and_other_processes_are_left_alone() -> None:
    script = """
import os
import torch
from tunesmith.train.heap import use_large_pages
use_large_pages()
assert "THP_MEM_ALLOC_ENABLE" not in os.environ
kept = torch.ones(64, 1024, 1024)
print(next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHuge")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout.split()[1]) > 64 * 1024, "most of 256 MiB"


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
    assert len(tidied) == 3 * 13, "each layer, its four parts, and the eight in those"


def test_a_model_without_a_list_of_layers_trains_as_it_is() -> None:
    class Odd(torch.nn.Linear):
        config = LlamaConfig(num_hidden_layers=7)

        def get_decoder(self) -> torch.nn.Module:
            return self

    model = Odd(2, 2)
    keep_small(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
