"""A scheme of the table, made in the way that a recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.config.schema.quantize import Quantize
from tunesmith.config.schemes import DEVICES, SCHEMES, Algorithm, Scheme

__all__ = ["DEVICES", "SCHEMES", "Method", "Scheme"]


@dataclass(frozen=True)
class Method:
    """One scheme and how it is made."""

    scheme: Scheme
    algorithm: Algorithm
    calibrated: bool
    """Whether it is made by looking at data."""

    group_size: int | None = None
    """Weights that share a scale; the largest that divides every layer when None."""

    symmetric: bool = True
    smoothquant: float | None = None
    rotation: Literal["spinquant"] | None = None
    kv_cache: Literal["fp8"] | None = None

    @property
    def name(self) -> str:
        """The scheme's."""
        return self.scheme.name

    @property
    def changes_activations(self) -> bool:
        """Whether layers meet other activations than those of the parent, so that an adapter
        fitted to the parent does not fit."""
        return self.algorithm == "awq" or bool(self.smoothquant or self.rotation)

    def layer_bytes(self, outputs: int, inputs: int, group_size: int | None) -> int:
        """Size of one stored layer."""
        return self.scheme.layer_bytes(outputs, inputs, group_size, symmetric=self.symmetric)

    @classmethod
    def of(cls, section: Quantize, name: str) -> Method:
        """What a recipe asks of one of its schemes."""
        return cls(
            scheme=SCHEMES[name],
            algorithm=section.algorithm_of(name),
            calibrated=section.calibrates(name),
            group_size=section.group_size,
            symmetric=section.symmetric,
            smoothquant=section.smoothquant,
            rotation=section.rotation,
            kv_cache=section.kv_cache,
        )
