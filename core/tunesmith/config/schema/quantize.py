"""The `quantize` section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tunesmith.config.schema.base import Fraction, NonNegative, Positive, SchemeName, Section
from tunesmith.config.schemes import SCHEMES, Algorithm, Scheme

Device = Literal["any", "cpu", "cpu_amx", "sm_80", "sm_89", "sm_90", "sm_100"]


class Quantize(Section):
    """Compressed checkpoints of the tuned model (of the base where the recipe trains nothing), in
    the format that vLLM loads. Every key has to suit every scheme."""

    scheme: SchemeName | tuple[SchemeName, ...]
    """One scheme or several; each becomes a checkpoint of its own."""

    device: Device | None = None
    """What will serve it: a CPU (`cpu_amx`: one with AMX), a GPU by its compute capability, or
    `any`. A scheme that vLLM cannot run there is refused; when null, this machine is taken, with no
    more than a warning."""

    algorithm: Algorithm | None = None
    """How weights are chosen: `gptq`, `awq` and `autoround` fit them to the activations of the
    calibration, `rtn` rounds each to the nearest. When null `gptq`, and `rtn` for the FP8
    schemes."""

    group_size: Literal[32, 64, 128] | None = None
    """Weights that share a scale, of the integer schemes with 16-bit activations; the largest that
    divides every layer when null."""

    symmetric: bool = True
    """False gives each group of `w4a16` a zero point as well: a little larger and more exact."""

    smoothquant: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Strength with which SmoothQuant moves outliers from the activations of `w8a8-int8` into its
    weights, such as 0.5; not at all when null."""

    rotation: Literal["spinquant"] | None = None
    """Rotate the weights of integer schemes first, which spreads outliers and costs nothing in
    serving."""

    kv_cache: Literal["fp8"] | None = None
    """Also measure scales for keys and values, so that the engine keeps them in 8 bits."""

    calibration_rows: Positive = 128
    """Training rows used to calibrate, rendered with the recipe's own template: of every source and
    every length their share, chosen by `seed`."""

    calibration_tokens: Positive | None = None
    """Fewer of them, so that they have no more tokens than this."""

    calibration_text: Literal["own", "generic"] | Path = "own"
    """What is calibrated on: the recipe's `own` rows, or as much `generic` English (the topics of
    Python's help) or of a text file, to measure what the own rows are worth."""

    verify_rows: NonNegative = 64
    """Held-out rows on which each checkpoint is compared with its parent, in the engine; 0 leaves
    checkpoints unverified."""

    max_loss_increase: Fraction | None = 0.05
    """Gate: how far the completion loss may rise above the parent's (0.01 is 1 %); no limit when
    null. Each gate compares the upper bound of the figure's interval: what few rows leave open is
    not approved."""

    max_kl: Annotated[float, Field(ge=0.0)] | None = 0.1
    """Gate: Kullback-Leibler divergence of the next-token distributions from the parent's, in nats
    per learnt token; no limit when null."""

    max_flipped: Fraction | None = None
    """Gate: share of learnt positions at which the likeliest token is another than the parent's;
    no limit when null."""

    allow_refused: bool = False
    """Let serve, batch and bench take a checkpoint that its verification refused."""

    @property
    def schemes(self) -> tuple[SchemeName, ...]:
        """What `scheme` names."""
        return (self.scheme,) if isinstance(self.scheme, str) else self.scheme

    def algorithm_of(self, scheme: str) -> Algorithm:
        """How the weights of one scheme are chosen."""
        return self.algorithm or SCHEMES[scheme].algorithms[0]

    def calibrates(self, scheme: str) -> bool:
        """Whether one scheme is made by looking at data."""
        return (
            self.algorithm_of(scheme) != "rtn"
            or SCHEMES[scheme].static_activations
            or self.kv_cache is not None
            or self.smoothquant is not None
        )

    def choices(self, scheme: str) -> dict[str, Any]:
        """The keys that decide what a checkpoint is, other than the defaults of its scheme."""
        keys = ("algorithm", "group_size", "symmetric", "smoothquant", "rotation", "kv_cache")
        found = self.model_dump(mode="json", include=set(keys), exclude_defaults=True)
        if self.algorithm == SCHEMES[scheme].algorithms[0]:
            del found["algorithm"]
        if self.calibrates(scheme):
            found |= {"sampling": "stratified", "calibration_tokens": self.calibration_tokens}
            is_named = isinstance(self.calibration_text, str)
            found["calibration_text"] = self.calibration_text if is_named else "file"
        return found

    @field_validator("device")
    @classmethod
    def _device_runs_the_schemes(cls, device: Device | None, info: ValidationInfo) -> Device | None:
        if device and device != "any":
            for scheme in _asked(info):
                if reason := scheme.devices()[device]:
                    raise ValueError(f"{scheme.name}: {reason}")
        return device

    @field_validator("algorithm")
    @classmethod
    def _algorithm_makes_the_schemes(
        cls, algorithm: Algorithm | None, info: ValidationInfo
    ) -> Algorithm | None:
        for scheme in _asked(info) if algorithm else ():
            if algorithm not in scheme.algorithms:
                raise ValueError(f"{scheme.name} is made by {' or '.join(scheme.algorithms)}")
        return algorithm

    @field_validator("group_size", "smoothquant", "rotation")
    @classmethod
    def _key_suits_the_schemes(cls, value: Any, info: ValidationInfo) -> Any:
        rules: dict[str, Callable[[Scheme], bool]] = {
            "group_size": lambda scheme: value in scheme.group_sizes,
            "smoothquant": lambda scheme: scheme.smoothable,
            "rotation": lambda scheme: scheme.rotatable,
        }
        suits = rules[str(info.field_name)]
        for scheme in _asked(info) if value is not None else ():
            if not suits(scheme):
                able = [one.name for one in SCHEMES.values() if suits(one)]
                raise ValueError(f"is not for {scheme.name}, but for {', '.join(able)}")
        return value

    @field_validator("symmetric")
    @classmethod
    def _zero_points_suit_the_schemes(cls, symmetric: bool, info: ValidationInfo) -> bool:
        for scheme in _asked(info) if not symmetric else ():
            if not scheme.asymmetric:
                able = [one.name for one in SCHEMES.values() if one.asymmetric]
                raise ValueError(f"{scheme.name} has no zero points; {', '.join(able)} may")
        return symmetric


def _asked(info: ValidationInfo) -> list[Scheme]:
    """The schemes that stand before a key; none when they are at fault themselves."""
    found = info.data.get("scheme", ())
    return [SCHEMES[name] for name in ((found,) if isinstance(found, str) else found)]
