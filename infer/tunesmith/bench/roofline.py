"""How near an engine comes to what its device can do. Pure, but for reading a model's folder.

Every pass reads all weights once, and for each sequence that decodes the keys and values of all
its tokens so far. Every token is multiplied with every weight of the matrices. Those bytes over
the measured memory bandwidth, and those operations over the measured rate of matrix products, are
the least time that the work can take; their share of the time that it took is reported.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.bench.ceiling import Ceiling
from tunesmith.bench.client import Sample
from tunesmith.bench.validity import Evidence

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Shape:
    """What of a model the time of a pass depends on."""

    pass_bytes: int
    """Weights that every pass reads."""
    kv_bytes_per_token: int
    """Keys and values of one token, over all layers."""
    matrix_parameters: int
    """Weights that every token is multiplied with."""
    layers: int
    attention_width: int
    """Heads times their size."""


@dataclass(frozen=True)
class Roofline:
    """Shares of what the device can do, 0 to 1."""

    memory: float
    compute: float

    @property
    def share(self) -> float:
        """Of the ceiling that binds."""
        return max(self.memory, self.compute)


def read_shape(folder: Path, dtype: str, adapter: Path | None = None) -> Shape | None:
    """Of a dense decoder in the Hugging Face layout; None of what this cannot count."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        vocabulary = config["vocab_size"]
    except (OSError, ValueError, KeyError):
        return None
    if any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    attention = hidden * width * (2 * heads + 2 * kv_heads)
    head = hidden * vocabulary
    read = _tensor_bytes(folder)
    tied = config.get("tie_word_embeddings", False)
    pass_bytes = sum(read.values())
    if not tied:  # one row of it for each token
        pass_bytes -= sum(size for name, size in read.items() if name.endswith(_EMBEDDING))
    if adapter:
        pass_bytes += sum(_tensor_bytes(adapter).values())
    return Shape(
        pass_bytes=pass_bytes,
        kv_bytes_per_token=2 * layers * kv_heads * width * _BYTES[dtype],
        matrix_parameters=layers * (attention + 3 * hidden * inner) + head,
        layers=layers,
        attention_width=heads * width,
    )


def weights_bytes(folder: Path, adapter: Path | None = None) -> int:
    """Size of all weights, those of an adapter too."""
    return sum(sum(_tensor_bytes(path).values()) for path in (folder, adapter) if path)


def roofline(evidence: Evidence, shape: Shape, ceiling: Ceiling) -> Roofline | None:
    """Of one round; None where the engine does not count its passes."""
    if not evidence.counted.steps or not evidence.wall_s:
        return None
    answered = [sample for sample in evidence.samples if sample.ok]
    kept = sum(map(_kept_tokens, answered))
    moved = evidence.counted.steps * shape.pass_bytes + kept * shape.kv_bytes_per_token
    tokens = sum(sample.input_tokens + sample.output_tokens - 1 for sample in answered)
    seen = sum(map(_seen_tokens, answered))
    operations = 2 * tokens * shape.matrix_parameters
    operations += 4 * seen * shape.layers * shape.attention_width
    return Roofline(
        memory=moved / (evidence.wall_s * ceiling.memory_gb_per_s * 1e9),
        compute=operations / (evidence.wall_s * ceiling.matmul_tflops * 1e12),
    )


def _kept_tokens(sample: Sample) -> int:
    """Tokens whose keys and values were read, over all decoding passes of an answer."""
    later = sample.output_tokens - 1
    return later * sample.input_tokens + later * (later + 1) // 2


def _seen_tokens(sample: Sample) -> int:
    """Pairs of tokens of which one attends to the other."""
    whole = sample.input_tokens + sample.output_tokens - 1
    return whole * (whole + 1) // 2


def _tensor_bytes(folder: Path) -> dict[str, int]:
    """Size of every tensor in a folder's safetensors files, from their headers alone."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = end - start
    return found
