"""Models of a known size with random weights, and rows of random tokens: what training costs on a
machine, without a download. Speed and memory are those of the real model; losses mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.config.errors import UserError
from tunesmith.train.examples import Example, Examples

_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    },
    "llama-1b": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "llama-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}  # fmt: skip
"""Name → sizes, in the names of transformers' `LlamaConfig`; the larger ones are Llama 3's."""


def shape_config(name: str, longest: int) -> Any:
    """The configuration of a shape, for sequences of up to `longest` tokens.

    Raises UserError on a name that is none.
    """
    from transformers import LlamaConfig

    if name not in SHAPES:
        raise UserError(f"--shape {name}: no such shape; there are {', '.join(SHAPES)}")
    sizes = {"tie_word_embeddings": False} | SHAPES[name]
    return LlamaConfig(**sizes, max_position_embeddings=longest, bos_token_id=None, eos_token_id=1)


def random_model(
    config: Any, dtype: torch.dtype, device: torch.device, *, nf4: bool = False
) -> Any:
    """A Llama whose weights are drawn where they are used, one matrix at a time; in 4-bit
    NormalFloat with `nf4`, so that no more than one matrix is ever there unpacked."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module is not head and nf4:
            continue
        _draw(module, config.initializer_range, dtype, device)
    if nf4:
        _pack(model, head, config.initializer_range, dtype, device)
    model.tie_weights()
    model.to(device)  # The buffers, which are small, were made on the CPU.
    return model


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> Examples:
    """Rows of one length in which every token is learnt."""
    random = np.random.default_rng(seed)
    learnt = np.ones(length, dtype=np.bool_)
    learnt[0] = False
    ids = random.integers(0, vocabulary, (count, length), dtype=np.int32)
    return Examples([Example(row, learnt) for row in ids])


def save_empty(config: Any, folder: Path) -> None:
    """The configuration and a small tokenizer, for a program that draws its own weights."""
    from tunesmith.train.tokenizer import learn_tokenizer

    config.save_pretrained(folder)
    texts = ["a tokenizer that nobody reads"]
    learn_tokenizer(texts, 512, config.max_position_embeddings).save_pretrained(folder)


def _draw(module: nn.Module, deviation: float, dtype: torch.dtype, device: torch.device) -> None:
    """Weights of one module: normal for matrices, ones for norms, zeros for biases."""
    for name, empty in list(module.named_parameters(recurse=False)):
        weight = torch.empty(empty.shape, dtype=dtype, device=device)
        if weight.ndim > 1:
            weight.normal_(0.0, deviation)
        else:
            weight.fill_(0.0 if name == "bias" else 1.0)
        setattr(module, name, nn.Parameter(weight))


def _pack(
    model: nn.Module, head: nn.Module, deviation: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Put a random 4-bit layer in the place of every linear layer but the head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear is head:
            continue
        with torch.device("meta"):
            packed = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        shape = (linear.out_features, linear.in_features)
        drawn = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation)
        packed.weight = Params4bit(
            drawn, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        ).to(device)
        packed.support_avx512bf16_for_cpu = False
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, packed)
