from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.config import ModelError
from tunesmith.config.schema.quantize import Quantize
from tunesmith.quantize.modules import select, split_by_shape
from tunesmith.quantize.schemes import Method


def method(name: str, **keys: object) -> Method:
    return Method.of(Quantize.model_validate({"scheme": name, **keys}), name)


W4A16 = method("w4a16")
ATTENTION = {"layers.0.self_attn.q_proj": (64, 64), "layers.0.self_attn.o_proj": (64, 64)}


def llama(**changes: object) -> LlamaForCausalLM:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes))


@pytest.mark.parametrize("tied", [False, True])
def test_every_module_with_weights_ends_in_exactly_one_list(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    selection = select(model, method("w8a8-int8"))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    assert selection.quantized.keys() | selection.kept.keys() == owners
    assert not selection.quantized.keys() & selection.kept.keys()
    assert len(selection.quantized) == 7 * 2
    assert selection.kept["lm_head"] == "output head"
    assert "Embedding" in selection.kept["model.embed_tokens"]


def test_linear_layers_outside_the_decoder_and_routers_are_kept() -> None:
    model = llama()
    model.vision = torch.nn.Linear(64, 64)
    model.model.layers[0].mlp.router = torch.nn.Linear(64, 64)
    kept = select(model, W4A16).kept
    assert kept["vision"] == "outside the text decoder"
    assert kept["model.layers.0.mlp.router"] == "router"


@pytest.mark.parametrize(("inputs", "group_size"), [(256, 128), (192, 64), (96, 32)])
def test_the_group_is_the_largest_that_divides_every_layer(inputs: int, group_size: int) -> None:
    linear = {"a.up": (256, 256), "b.down": (256, inputs)}
    assert split_by_shape(linear, {}, W4A16).group_size == group_size


def test_a_group_size_of_the_recipe_has_to_divide_every_layer() -> None:
    linear = {"a.up": (256, 256), "b.down": (256, 192)}
    assert split_by_shape(linear, {}, method("w4a16", group_size=32)).group_size == 32
    with pytest.raises(ModelError, match="group_size: 128 does not divide the 192 inputs of b.dow"):
        split_by_shape(linear, {}, method("w4a16", group_size=128))


def test_a_shape_without_kernel_keeps_the_layers_that_are_joined_with_it() -> None:
    mlp = {"layers.0.mlp.up_proj": (200, 64), "layers.0.mlp.gate_proj": (64, 64)}
    selection = split_by_shape(ATTENTION | mlp, {"norm": "LlamaRMSNorm"}, W4A16)
    assert selection.quantized == ATTENTION
    assert selection.kept.keys() == mlp.keys() | {"norm"}
    assert "layers.0.mlp.up_proj is 200 x 64" in selection.kept["layers.0.mlp.gate_proj"]


def test_a_model_of_which_nothing_can_be_quantized_is_refused_by_name_of_the_layer() -> None:
    with pytest.raises(ModelError, match="w4a16 needs multiples of 32, x.q_proj is 48 x 96"):
        split_by_shape({"x.q_proj": (48, 96)}, {}, W4A16)
    with pytest.raises(ModelError, match="no linear layers"):
        split_by_shape({}, {"embed": "Embedding"}, W4A16)
