"""The recipe: one strict, frozen model per section; each docstring is its reference."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tunesmith.config.schema.base import Model, NonNegative, Price, Section, Store
from tunesmith.config.schema.batch import Batch
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.data import Data
from tunesmith.config.schema.engine import Engine
from tunesmith.config.schema.evaluate import Evaluate
from tunesmith.config.schema.quantize import Quantize
from tunesmith.config.schema.serve import Serve
from tunesmith.config.schema.train import Train


class Recipe(Section):
    """One file from a data set to a served, quantized, costed model; every section is optional
    except `name` and `model`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """What versions and aliases are filed under: lower case, digits, `.`, `_`, `-`."""

    seed: NonNegative = 17
    """Seed of every random choice."""

    store: Store = Store()
    """Where results are kept."""

    model: Model
    """The base model."""

    data: Data | None = None
    """Training and held-out rows."""

    train: Train | None = None
    """Makes the tuned model."""

    quantize: Quantize | None = None
    """Makes smaller copies of it."""

    evaluate: Evaluate | None = None
    """Measures the quality of each."""

    engine: Engine = Engine()
    """How vLLM runs."""

    batch: Batch | None = None
    """Answers a file of prompts."""

    serve: Serve | None = None
    """Answers requests."""

    bench: Bench | None = None
    """Measures speed and cost."""

    price: Price | None = None
    """Turns device time into USD."""

    @property
    def serves_adapter(self) -> bool:
        """Whether any section has the engine load the adapter over its base."""
        asked: list[str | None] = [self.batch.model] if self.batch else []
        if self.serve and self.serve.upstreams:
            served = self.serve.upstreams.values()
            asked += ["adapter" if one.adapter else one.model for one in served if not one.url]
        elif self.serve:
            asked.append(self.serve.model)
        asked += self.batch.adapters.values() if self.batch else []
        asked += (self.evaluate.variants or [None]) if self.evaluate else []
        asked += [None] if self.bench else []
        by_default = self.train is not None and not self.train.merge and None in asked
        return "adapter" in asked or by_default

    @model_validator(mode="after")
    def _sections_have_what_they_need(self) -> Recipe:
        pretrain = self.train is not None and self.train.method == "pretrain"
        if pretrain == (self.model.base is not None):
            raise ValueError("model.base is required, except for train.method: pretrain")
        if self.train and not self.data:
            raise ValueError("train needs a data section")
        prefers = self.train is not None and self.train.preference is not None
        if self.train and self.data and prefers != (self.data.format == "preference"):
            raise ValueError("train.preference is given exactly when data.format is preference")
        if prefers and pretrain:
            raise ValueError("train.preference needs a model that answers already, so a base")
        if self.train and self.train.base_precision == "fp8" and self.model.dtype != "bfloat16":
            raise ValueError("train.base_precision: fp8 needs model.dtype: bfloat16")
        if self.quantize and not self.data:
            raise ValueError("quantize needs a data section to calibrate on")
        over = self.train.over if self.train else None
        schemes = self.quantize.schemes if self.quantize else ()
        if over and over not in schemes:
            raise ValueError(f"train.over: {over} is made by quantize: add it to quantize.scheme")
        adapts = self.train and self.train.method in ("lora", "qlora") and not self.train.merge
        if self.quantize and adapts and not over:
            raise ValueError(
                "quantize needs the merged model: train.merge: true, or train.over to train over "
                "the quantized base"
            )
        if self.evaluate and not self.data:
            raise ValueError("evaluate needs a data section")
        if self.train and self.train.sharding == "full" and self.model.dtype == "float16":
            raise ValueError("train.sharding: full needs model.dtype bfloat16 or float32")
        if self.train and self.train.lora.use_dora and self.serves_adapter:
            raise ValueError(
                "vLLM cannot serve a DoRA adapter over its base: use the model tuned, with "
                "train.merge: true"
            )
        mends_nf4 = (
            self.train and self.train.lora.init_lora_weights == "loftq" and not self.train.over
        )
        if mends_nf4 and self.serves_adapter:
            raise ValueError(
                "a LoftQ adapter mends 4-bit weights, which vLLM does not serve: use the model "
                "tuned, with train.merge: true"
            )
        return self
