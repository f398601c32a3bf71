"""The `quantize` section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tunesmith.config.schema.base import Fraction, NonNegative, Positive, SchemeName, Section
from tunesmith.config.schemes import SCHEMES, Algorithm, Scheme

AUTO = "auto"
"""The scheme that is searched for."""

Device = Literal["any", "cpu", "cpu_amx", "sm_80", "sm_89", "sm_90", "sm_100"]


class Search(Section):
    """How `scheme: auto` chooses among the checkpoints that keep the recipe's limits."""

    candidates: tuple[SchemeName, ...] | None = None
    """What may be chosen; when null every scheme that `device` runs."""

    minimize: Literal["size", "time", "loss"] = "size"
    """`size` tries from the smallest up and takes the first that passes; `time` tries all and takes
    the one that answers a full queue fastest, `loss` the one nearest to the parent."""

    max_size: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of the parent's bytes that a checkpoint may have."""

    mix: bool = True
    """Where `size` has a scheme fail, also try it with the blocks that it hurts most left in 16
    bits, as long as that is smaller than what passes."""


class Recover(Section):
    """A LoRA over each checkpoint that wins back what quantization lost: it is distilled from the
    model that was quantized, on the training rows, and served over the checkpoint."""

    schemes: tuple[SchemeName, ...] | None = None
    """Those of `scheme` that get one; all when null."""

    r: Positive = 32
    """Rank of the adapter."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate, after a short warm-up and before a cosine to nothing."""

    max_steps: Positive = 200
    """Optimizer steps."""

    per_device_train_batch_size: Positive = 8
    """Sequences per optimizer step."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


class Quantize(Section):
    """Compressed checkpoints of the tuned model (of the base where the recipe trains nothing), in
    the format that vLLM loads. Every key has to suit every scheme."""

    scheme: SchemeName | tuple[SchemeName, ...] | Literal["auto"]
    """One scheme or several; each becomes a checkpoint of its own. `auto` tries schemes and takes
    the best one within the limits (`max_loss_increase` and those after it)."""

    search: Search = Search()
    """How `auto` chooses."""

    keep: tuple[str, ...] = ()
    """Layers to leave in 16 bits, by the beginnings of their names, such as
    `model.layers.0.mlp`."""

    device: Device | None = None
    """What will serve it: a CPU (`cpu_amx`: one with AMX), a GPU by its compute capability, or
    `any`. A scheme that vLLM cannot run there is refused; when null, this machine is taken, with no
    more than a warning."""

    algorithm: Algorithm | None = None
    """How weights are chosen: `gptq` and `awq` fit them to the activations of the
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
    every length their share, chosen by `seed`. Of documents, as many pieces of
    `data.max_length` tokens."""

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

    recover: Recover | None = None
    """Also make adapters that win back what was lost."""

    @property
    def recovered(self) -> tuple[str, ...]:
        """The schemes whose checkpoints get an adapter, in the recipe's order."""
        if self.recover is None:
            return ()
        asked = self.recover.schemes
        made = [scheme for scheme in self.schemes if scheme != AUTO]
        return tuple(scheme for scheme in made if asked is None or scheme in asked)

    @property
    def schemes(self) -> tuple[SchemeName | Literal["auto"], ...]:
        """What `scheme` names."""
        return (self.scheme,) if isinstance(self.scheme, str) else self.scheme

    @property
    def planned(self) -> tuple[str, ...]:
        """The schemes that may be made: those named, or what `auto` may try."""
        if self.scheme == AUTO:
            able = (one.name for one in SCHEMES.values() if self.device not in one.refused_by)
            return self.search.candidates or tuple(able)
        return self.schemes

    @property
    def limits(self) -> dict[str, float | None]:
        """The gates, by key."""
        return self.model_dump(include={"max_loss_increase", "max_kl", "max_flipped"})

    def algorithm_of(self, scheme: str) -> Algorithm:
        """How the weights of one scheme are chosen."""
        return self.algorithm or SCHEMES[scheme].algorithms[0]

    def calibrates(self, scheme: str) -> bool:
        """Whether one scheme is made by looking at data."""
        return (
            scheme == AUTO
            or self.algorithm_of(scheme) != "rtn"
            or SCHEMES[scheme].static_activations
            or self.kv_cache is not None
            or self.smoothquant is not None
        )

    def choices(self, scheme: str) -> dict[str, Any]:
        """The keys that decide what a checkpoint is, other than the defaults of its scheme."""
        keys = ("algorithm", "group_size", "symmetric", "smoothquant", "rotation", "kv_cache")
        found = self.model_dump(mode="json", include={*keys, "keep"}, exclude_defaults=True)
        if scheme == AUTO:
            searched = self.model_dump(mode="json", include={"search", "device", "verify_rows"})
            return found | searched | self.limits | self._calibration()
        if self.algorithm == SCHEMES[scheme].algorithms[0]:
            del found["algorithm"]
        return found | (self._calibration() if self.calibrates(scheme) else {})

    def _calibration(self) -> dict[str, Any]:
        is_named = isinstance(self.calibration_text, str)
        return {
            "sampling": "stratified",
            "calibration_tokens": self.calibration_tokens,
            "calibration_text": self.calibration_text if is_named else "file",
        }

    @field_validator("verify_rows")
    @classmethod
    def _a_search_needs_rows(cls, verify_rows: int, info: ValidationInfo) -> int:
        if info.data.get("scheme") == AUTO and not verify_rows:
            raise ValueError("scheme: auto judges what it tries on these rows: give some")
        return verify_rows

    @field_validator("recover")
    @classmethod
    def _what_is_recovered_is_made(
        cls, recover: Recover | None, info: ValidationInfo
    ) -> Recover | None:
        if recover and info.data.get("scheme") == AUTO:
            raise ValueError("name the schemes: what auto takes is not known before")
        made = [scheme.name for scheme in _asked(info)]
        for name in (recover.schemes or ()) if recover and made else ():
            if name not in made:
                raise ValueError(f"{name} is not made: add it to quantize.scheme")
        return recover

    @field_validator("device")
    @classmethod
    def _device_runs_the_schemes(cls, device: Device | None, info: ValidationInfo) -> Device | None:
        search: Search | None = info.data.get("search")
        is_open = info.data.get("scheme") == AUTO and not (search and search.candidates)
        if device and device != "any" and not is_open:
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
    if found == AUTO:
        search: Search | None = info.data.get("search")
        found = (search.candidates if search else None) or tuple(SCHEMES)
    return [SCHEMES[name] for name in ((found,) if isinstance(found, str) else found)]
