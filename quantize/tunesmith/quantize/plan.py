"""What quantizing would take: the most memory, by part, and the time.

Shapes are those of the model, built without its weights; the calibration texts are tokenised. What
is held at once follows from how layers are worked on (see stream.py); time rests on constants that
were measured once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import require
from tunesmith.pipeline import Stages
from tunesmith.pipeline.configs import config_folder
from tunesmith.quantize.calibration import calibration_of
from tunesmith.quantize.modules import Shape, select
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.skeleton import Skeleton
from tunesmith.terminal import make_table

_FLOAT_BYTES = 4
_COLUMN_S, _PASS_S = 4e-4, 2e-3
"""Steps of Python, whatever the size: for a column of a matrix, and a text through a layer."""

_DISK_BYTES_PER_S = 1e9
"""An assumption, too."""

_SHARE = 0.4
"""Of what large matrix products reach: an assumption, as in training."""


@dataclass(frozen=True)
class Work:
    """What there is to do for one scheme."""

    shapes: Mapping[str, Shape]
    """The matrices of the largest layer that are quantized."""

    layer_bytes: int
    outside_bytes: int
    layers: int
    lengths: tuple[int, ...]
    """Tokens of each calibration text; none where no data is looked at."""

    heads: int
    algorithm: str
    whole: bool
    """Whether all layers are held at once."""

    itemsize: int

    @classmethod
    def of(cls, skeleton: Skeleton, method: Method, lengths: tuple[int, ...]) -> Work:
        """Raises ModelError when the model has nothing to quantize."""
        selection = select(skeleton.model, method)
        sizes = {
            name: sum(tensor.nbytes for tensor in skeleton.stored(layer, f"{name}.").values())
            for name, layer in skeleton.layers.items()
        }
        largest = max(sizes, key=sizes.__getitem__)
        within = f"{largest}."
        return cls(
            shapes={
                name: at for name, at in selection.quantized.items() if name.startswith(within)
            },
            layer_bytes=sizes[largest],
            outside_bytes=sum(tensor.nbytes for tensor in skeleton.outside().values()),
            layers=len(sizes),
            lengths=lengths,
            heads=skeleton.model.config.get_text_config().num_attention_heads,
            algorithm=method.algorithm,
            whole=bool(method.rotation),
            itemsize=next(skeleton.model.parameters()).itemsize,
        )

    def parts_bytes(self) -> dict[str, int]:
        """What is held at once, at most, beside the libraries themselves."""
        matrices = self.shapes.values()
        widest = max(max(shape) for shape in matrices)
        copies = 4 if self.algorithm == "gptq" else 0
        parts = {
            "one layer": self.layer_bytes,
            "one matrix at work": _FLOAT_BYTES
            * max(copies * columns**2 + 3 * rows * columns for rows, columns in matrices),
        }
        if self.algorithm == "gptq":
            parts["hessians"] = _FLOAT_BYTES * sum(columns**2 for _, columns in matrices)
        if self.algorithm == "awq":
            parts["all texts"] = sum(self.lengths) * 5 * widest * self.itemsize
        if self.lengths:
            tokens = max(self.lengths)
            scores = 2 * self.heads * tokens**2 * _FLOAT_BYTES
            parts["one text"] = scores + 4 * tokens * widest * self.itemsize
        if self.whole:
            parts["all else"] = (self.layers - 1) * self.layer_bytes + self.outside_bytes
        elif (more := self.outside_bytes - sum(parts.values())) > 0:
            # The embeddings are let go of before the first layer comes.
            parts["embeddings and head"] = more
        return parts

    def flops(self) -> float:
        """Of every layer: two passes of all texts, the Hessians, and the columns."""
        tokens = sum(self.lengths)
        per_layer = 0.0
        for rows, columns in self.shapes.values():
            per_layer += 4 * rows * columns * tokens
            if self.algorithm == "gptq":
                per_layer += 2 * columns**2 * tokens + 1.5 * columns**3 + rows * columns**2
        return self.layers * per_layer

    def steps_s(self) -> float:
        """Time that products do not take: steps of Python, and reading and writing."""
        columns = sum(columns for _, columns in self.shapes.values())
        fitted_s = columns * _COLUMN_S if self.algorithm == "gptq" else 0.0
        moved_s = 2 * self.layer_bytes / _DISK_BYTES_PER_S
        return self.layers * (moved_s + fitted_s + 2 * len(self.lengths) * _PASS_S)


def run(stages: Stages, tflops: float | None = None) -> list[dict[str, Any]]:
    """Figures for every scheme of the recipe; none while the base has not been made.

    `tflops` is the speed of matrix products on the device; this machine's when None.
    """
    for module in ("torch", "transformers"):
        require(module, "quantize")
    recipe, found = stages.recipe, []
    folder = _folder(stages)
    if folder is None or recipe.quantize is None:
        return []
    skeleton = Skeleton.of(folder, recipe.model.dtype, recipe.model.trust_remote_code)
    dataset = stages.store.find(stages.dataset.id)
    speed = tflops or _measure_tflops(recipe.model.dtype)
    for name in recipe.quantize.planned:
        method = Method.of(recipe.quantize, name)
        texts = None
        if method.calibrated and dataset:
            texts = calibration_of(recipe, dataset, folder)
        lengths = tuple(map(len, texts.input_ids)) if texts else ()
        work = Work.of(skeleton, method, lengths)
        parts = work.parts_bytes()
        seconds = work.flops() / (speed * 1e12 * _SHARE) + work.steps_s()
        found.append(
            {
                "scheme": name,
                "held": "the whole model" if work.whole else "one layer",
                "layers": work.layers,
                "calibration_tokens": sum(lengths) if texts else None,
                "parts_gib": {part: round(size / 2**30, 4) for part, size in parts.items()},
                "peak_gib": round(sum(parts.values()) / 2**30, 4),
                "hours": round(seconds / 3600, 9),
            }
        )
    return found


def show(planned: list[dict[str, Any]]) -> Any:
    """One line per scheme."""
    rows = [
        (
            one["scheme"],
            f"{one['peak_gib']:.3f}",
            one["held"],
            max(one["parts_gib"], key=one["parts_gib"].__getitem__),
            "-" if one["calibration_tokens"] is None else f"{one['calibration_tokens']:,}",
            f"{one['hours']:.4f}",
        )
        for one in planned
    ]
    columns = (
        "scheme",
        "GiB beside the libraries",
        "held at once",
        "most of it",
        "tokens",
        "hours",
    )
    return make_table("quantizing", columns, rows)


def _folder(stages: Stages) -> Path | None:
    """Where the parent's configuration and tokenizer are, as far as they are there already."""
    recipe = stages.recipe
    parent = stages.store.find(stages.unquantized.id)
    if parent:
        return parent.root
    pretrains = recipe.train and recipe.train.method == "pretrain"
    return None if pretrains else config_folder(stages)


def _measure_tflops(dtype: str) -> float:
    """Of matrix products on this machine, for a moment."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    for count in (1, 4):
        started_s = time.monotonic()
        for _ in range(count):
            product = matrix @ matrix
        float(product[0, 0])
        taken_s = time.monotonic() - started_s
    return count * 2 * size**3 / taken_s / 1e12
