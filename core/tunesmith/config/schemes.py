"""The one table of quantization schemes: how many bits, how many bytes, how a recipe may have them
made, and where vLLM runs them.

It belongs to the ground: a recipe that asks for what cannot be is refused while it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Algorithm = Literal["gptq", "rtn", "awq"]

DEVICES = {
    "cpu": "CPU",
    "cpu_amx": "CPU with AMX",
    "sm_80": "Ampere (A100)",
    "sm_89": "Ada (L4, L40S)",
    "sm_90": "Hopper (H100, H200)",
    "sm_100": "Blackwell (B200)",
}
"""Every device the table speaks of; the keys are what `Scheme.refused_by` uses."""

_PARAMETER_BYTES = 2
_SHAPE_BYTES = 16
_GLOBAL_SCALE_BYTES = 4


@dataclass(frozen=True)
class Scheme:
    """One way to store the weights of linear layers."""

    name: str
    preset: str
    """Its name in compressed-tensors."""

    weight_bits: int
    activation_bits: int
    is_float: bool = False
    """Whether the stored numbers are floats rather than integers."""

    scales: Literal["tensor", "channel", "group", "block"] = "channel"
    """What shares a scale: the whole matrix, an output channel, a group along the input, or a
    square."""

    group_sizes: tuple[int, ...] = ()
    """Weights that may share a scale along the input, best first; of a square, its side."""

    scale_bytes: int = _PARAMETER_BYTES
    has_global_scale: bool = False
    """Whether there is one more scale for the whole matrix."""

    static_activations: bool = False
    """Whether scales of activations are measured in calibration and stored."""

    algorithms: tuple[Algorithm, ...] = ("gptq", "rtn")
    """How its weights can be chosen, best first: by what activations they meet in calibration
    (`gptq`, `awq`), or each to the nearest value (`rtn`), which needs no data."""

    asymmetric: bool = False
    """Whether groups may have a zero point as well."""

    smoothable: bool = False
    """Whether SmoothQuant helps: it moves outliers from integer activations into the weights."""

    rotatable: bool = False
    """Whether the weights may be rotated to spread outliers."""

    multiple_of: int = 16
    """Both sides of a layer must be divisible by this for a kernel on every device."""

    refused_by: Mapping[str, str] = field(default_factory=dict)
    """Devices on which vLLM cannot run it, with the reason; it runs on all others."""

    computed_as: Mapping[str, str] = field(default_factory=dict)
    """Devices on which vLLM computes with other activations than it was made for, with how."""

    def layer_bytes(
        self, outputs: int, inputs: int, group_size: int | None, *, symmetric: bool = True
    ) -> int:
        """Size of one stored layer."""
        stored = outputs * inputs * self.weight_bits // 8
        match self.scales:
            case "tensor":
                scales = 1
            case "channel":
                scales = outputs
            case "group":
                assert group_size
                scales = outputs * (inputs // group_size)
            case "block":
                assert group_size
                scales = -(-outputs // group_size) * -(-inputs // group_size)
        stored += scales * self.scale_bytes
        if not symmetric:
            # Zero points are packed along the outputs.
            stored += scales * self.weight_bits // 8
        if self.scales == "group" and not self.is_float:
            stored += _SHAPE_BYTES
        if self.has_global_scale:
            stored += _GLOBAL_SCALE_BYTES * (2 if self.static_activations else 1)
        elif self.static_activations:
            stored += _PARAMETER_BYTES
        return stored

    def runs_on(self) -> list[str]:
        """The devices on which vLLM runs it."""
        return [device for device in DEVICES if device not in self.refused_by]

    def devices(self) -> dict[str, str | None]:
        """Every device, with why it cannot run this: the reason, what can, and the nearest scheme
        for that device; None where it runs."""
        able = ", ".join(DEVICES[one] for one in self.runs_on())
        return {
            device: (
                f"{self.refused_by[device]}; it runs on {able}; "
                f"nearest here: {nearest(self, device).name}"
                if device in self.refused_by
                else None
            )
            for device in DEVICES
        }


def refusal(
    devices: Mapping[str, str | None], capability: int | None, *, has_amx: bool = False
) -> str | None:
    """Why a device cannot run what `devices` describes (the reason by device, None where it runs);
    None when it can.

    `capability` is the GPU's compute capability (90 for Hopper), None for a CPU. A GPU that is not
    in the table counts as the nearest older one that is.
    """
    if capability is None:
        return devices.get("cpu_amx" if has_amx and "cpu_amx" in devices else "cpu")
    known = sorted(int(name.removeprefix("sm_")) for name in devices if name.startswith("sm_"))
    older = [number for number in known if number <= capability]
    return devices[f"sm_{older[-1]}"] if older else None


def schemes_in(quantization: Mapping[str, Any]) -> list[Scheme]:
    """The schemes of the table that a checkpoint's `quantization_config` uses."""
    groups = quantization.get("config_groups", {}).values()
    return [scheme for scheme in SCHEMES.values() if any(_is_of(scheme, group) for group in groups)]


def _is_of(scheme: Scheme, group: Mapping[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    size = weights.get("group_size")
    return (
        weights.get("num_bits") == scheme.weight_bits
        and (weights.get("type") == "float") == scheme.is_float
        and str(weights.get("strategy")).removeprefix("tensor_") == scheme.scales
        and (scheme.scales != "group" or size in scheme.group_sizes)
        and inputs.get("num_bits", 16) == scheme.activation_bits
        and (inputs.get("dynamic") is False) == (scheme.scales == "tensor")
    )


def has_amx() -> bool:
    """Whether this machine's CPU multiplies matrices in hardware, which some kernels need."""
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "amx_tile" in cpu.read_text(encoding="utf-8")


def nearest(scheme: Scheme, device: str) -> Scheme:
    """The scheme most like another among those that a device runs."""

    def distance(other: Scheme) -> tuple[int, int, bool]:
        return (
            abs(other.weight_bits - scheme.weight_bits),
            abs(other.activation_bits - scheme.activation_bits),
            other.is_float != scheme.is_float,
        )

    return min((one for one in SCHEMES.values() if device not in one.refused_by), key=distance)


def _on_cpus(reason: str) -> dict[str, str]:
    return {"cpu": reason, "cpu_amx": reason}


_INTEGER_CPUS = _on_cpus("vLLM's CPU kernel for integer weights alone takes 4 bits and no others")
_FLOAT_CPUS = _on_cpus("vLLM has no kernel for 4-bit floats on CPUs")
_WEIGHTS_ALONE = "activations in 16 bits: these GPUs have no units for this format"
_GROUPS = (128, 64, 32)
_CHOSEN: tuple[Algorithm, ...] = ("gptq", "rtn", "awq")

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w8a8-int8",
            preset="W8A8",
            weight_bits=8,
            activation_bits=8,
            smoothable=True,
            rotatable=True,
            refused_by={"sm_100": "vLLM has no INT8 kernel for Blackwell"},
        ),
        Scheme(
            name="fp8-dynamic",
            preset="FP8_DYNAMIC",
            weight_bits=8,
            activation_bits=8,
            is_float=True,
            algorithms=("rtn", "gptq"),
            refused_by=_on_cpus("vLLM has no usable FP8 kernel with per-channel scales for CPUs"),
            computed_as={"sm_80": _WEIGHTS_ALONE},
        ),
        Scheme(
            name="fp8-static",
            preset="FP8",
            weight_bits=8,
            activation_bits=8,
            is_float=True,
            scales="tensor",
            static_activations=True,
            algorithms=("rtn", "gptq"),
            refused_by=_on_cpus(
                "vLLM for CPUs cannot quantize activations to FP8 by a stored scale"
            ),
            computed_as={"sm_80": _WEIGHTS_ALONE},
        ),
        Scheme(
            name="fp8-block",
            preset="FP8_BLOCK",
            weight_bits=8,
            activation_bits=8,
            is_float=True,
            scales="block",
            group_sizes=(128,),
            algorithms=("rtn", "gptq"),
            multiple_of=128,
            refused_by={"cpu": "vLLM's FP8 block kernel for CPUs needs AMX"},
            computed_as={"sm_80": _WEIGHTS_ALONE},
        ),
        Scheme(
            name="w8a16",
            preset="W8A16",
            weight_bits=8,
            activation_bits=16,
            scales="group",
            group_sizes=_GROUPS,
            algorithms=_CHOSEN,
            multiple_of=32,
            refused_by=_INTEGER_CPUS,
        ),
        Scheme(
            name="w4a16",
            preset="W4A16",
            weight_bits=4,
            activation_bits=16,
            scales="group",
            group_sizes=_GROUPS,
            algorithms=_CHOSEN,
            asymmetric=True,
            rotatable=True,
            multiple_of=32,
        ),
        Scheme(
            name="w3a16",
            preset="W3A16",
            weight_bits=3,
            activation_bits=16,
            scales="group",
            group_sizes=_GROUPS,
            algorithms=_CHOSEN,
            rotatable=True,
            multiple_of=32,
            refused_by=_INTEGER_CPUS,
        ),
        Scheme(
            name="w2a16",
            preset="W2A16",
            weight_bits=2,
            activation_bits=16,
            scales="group",
            group_sizes=_GROUPS,
            algorithms=_CHOSEN,
            rotatable=True,
            multiple_of=32,
            refused_by=_INTEGER_CPUS,
        ),
        Scheme(
            name="nvfp4",
            preset="NVFP4",
            weight_bits=4,
            activation_bits=4,
            is_float=True,
            scales="group",
            group_sizes=(16,),
            scale_bytes=1,
            has_global_scale=True,
            static_activations=True,
            multiple_of=32,
            refused_by=_FLOAT_CPUS,
            computed_as=dict.fromkeys(("sm_80", "sm_89", "sm_90"), _WEIGHTS_ALONE),
        ),
        Scheme(
            name="nvfp4a16",
            preset="NVFP4A16",
            weight_bits=4,
            activation_bits=16,
            is_float=True,
            scales="group",
            group_sizes=(16,),
            scale_bytes=1,
            has_global_scale=True,
            multiple_of=32,
            refused_by=_FLOAT_CPUS,
        ),
        Scheme(
            name="mxfp4",
            preset="MXFP4",
            weight_bits=4,
            activation_bits=4,
            is_float=True,
            scales="group",
            group_sizes=(32,),
            scale_bytes=1,
            multiple_of=32,
            refused_by=_FLOAT_CPUS,
            computed_as=dict.fromkeys(("sm_80", "sm_89", "sm_90"), _WEIGHTS_ALONE),
        ),
        Scheme(
            name="mxfp4a16",
            preset="MXFP4A16",
            weight_bits=4,
            activation_bits=16,
            is_float=True,
            scales="group",
            group_sizes=(32,),
            scale_bytes=1,
            multiple_of=32,
            refused_by=_FLOAT_CPUS,
            computed_as={"sm_100": "activations in 4 bits too, as mxfp4"},
        ),
    )
}
