"""The one table of quantization schemes: how many bits, how many bytes, where vLLM runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEVICES = {
    "cpu": "CPU",
    "sm_80": "Ampere (A100)",
    "sm_89": "Ada (L4, L40S)",
    "sm_90": "Hopper (H100, H200)",
    "sm_100": "Blackwell (B200)",
}
"""Every device the table speaks of; the keys are what `Scheme.refused_by` uses."""

_SCALE_BYTES = 2
_SHAPE_BYTES = 16


@dataclass(frozen=True)
class Scheme:
    """One way to store the weights of linear layers."""

    name: str
    preset: str
    """Its name in compressed-tensors."""

    weight_bits: int
    activation_bits: int

    group_sizes: tuple[int, ...] = ()
    """Weights that may share a scale along the input, best first; every output channel has one
    scale when empty."""

    calibrated: bool = True
    """Whether weights are chosen (GPTQ) by what activations they meet in calibration."""

    multiple_of: int = 16
    """Both sides of a layer must be divisible by this for a kernel on every device."""

    refused_by: Mapping[str, str] = field(default_factory=dict)
    """Devices on which vLLM cannot run it, with the reason; it runs on all others."""

    def layer_bytes(self, outputs: int, inputs: int, group_size: int | None) -> int:
        """Size of one stored layer with 16-bit scales."""
        groups = inputs // group_size if group_size else 1
        packed = outputs * inputs * self.weight_bits // 8
        return packed + outputs * groups * _SCALE_BYTES + (_SHAPE_BYTES if group_size else 0)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w8a8-int8",
            preset="W8A8",
            weight_bits=8,
            activation_bits=8,
            refused_by={"sm_100": "vLLM has no INT8 kernel for Blackwell; use fp8-dynamic"},
        ),
        Scheme(
            name="w4a16",
            preset="W4A16",
            weight_bits=4,
            activation_bits=16,
            group_sizes=(128, 64, 32),
            multiple_of=32,
        ),
        Scheme(
            name="fp8-dynamic",
            preset="FP8_DYNAMIC",
            weight_bits=8,
            activation_bits=8,
            calibrated=False,
            refused_by={"cpu": "vLLM has no FP8 kernel with per-channel scales for CPUs"},
        ),
    )
}
