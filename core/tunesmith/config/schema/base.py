"""What the sections of a recipe are made of, and those that every stage reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.config.offers import offers


class Section(BaseModel):
    """Unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Money = Annotated[float, Field(ge=0.0)]
Dtype = Literal["bfloat16", "float16", "float32"]
SchemeName = Literal[
    "w8a8-int8",
    "fp8-dynamic",
    "fp8-static",
    "fp8-block",
    "w8a16",
    "w4a16",
    "w3a16",
    "w2a16",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
    "mxfp4a16",
]
"""The rows of `tunesmith.config.schemes.SCHEMES`."""

RecoveredName = Literal[
    "w8a8-int8+recover",
    "fp8-dynamic+recover",
    "fp8-static+recover",
    "fp8-block+recover",
    "w8a16+recover",
    "w4a16+recover",
    "w3a16+recover",
    "w2a16+recover",
    "nvfp4+recover",
    "nvfp4a16+recover",
    "mxfp4+recover",
    "mxfp4a16+recover",
]
"""The same under the adapter that `quantize.recover` makes for each."""

Variant = Literal["base", "tuned", "adapter", "auto", SchemeName, RecoveredName]


class Store(Section):
    """Where artifacts and their index live; it never changes what is made."""

    folder: Path = Path(".tunesmith")
    """Folder for artifacts and work in progress, relative to the working directory."""

    ledger: str | None = None
    """SQLAlchemy URL of a shared ledger (`postgresql+psycopg://…`); a SQLite file in `folder`
    when null."""


class Model(Section):
    """The model that every section of the recipe speaks of."""

    base: str | None = None
    """Hub id, local folder, artifact id, or `builtin/tiny-llama`; null only for
    `train.method: pretrain`, which makes a base."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is recorded."""

    dtype: Dtype = "bfloat16"
    """Precision of the weights in training, merging and serving."""

    chat_template: Path | None = None
    """A Jinja chat template to use in place of the tokenizer's own, in training and serving."""

    trust_remote_code: bool = False
    """Allow Python code that comes with a hub model to run."""


class Price(Section):
    """What the hardware costs: give one of the two."""

    gpu_hour_usd: Money
    """Price of one device-hour (a GPU, or this whole machine where there is none), in USD; taken
    from `offer` when that is given."""

    offer: str | None = None
    """A price of the sheet `tunesmith/config/offers.yaml`, such as `lambda/h100-sxm`; each has its
    source and the day it was read."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_offer(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("offer") is None:
            return given
        found = offers().get(given["offer"])
        if found is None:
            raise ValueError(
                f"no offer {given['offer']!r}; there are {', '.join(sorted(offers()))}"
            )
        if given.get("gpu_hour_usd", found.gpu_hour_usd) != found.gpu_hour_usd:
            raise ValueError(
                f"offer is {found.gpu_hour_usd} USD an hour: leave out gpu_hour_usd, or offer"
            )
        return given | {"gpu_hour_usd": found.gpu_hour_usd}
