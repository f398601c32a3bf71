"""One item of `serve.guardrails`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.schema.base import Section

Pii = Literal["email", "phone", "card", "iban", "ip"]


class Guardrail(Section):
    """What may not go in, or come out, and what becomes of it. Without keywords, patterns or PII a
    guardrail would do nothing, so it needs one of them."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
    """What it is called in masks, in the log and in `/metrics`."""

    pii: tuple[Pii, ...] = ()
    """Kinds of personal data: e-mail addresses, phone numbers, card numbers (with Luhn's check),
    IBANs (with their checksum), IP addresses."""

    keywords: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Whole words or phrases, in upper or lower case."""

    patterns: tuple[Annotated[str, Field(min_length=1, max_length=2000)], ...] = ()
    """Regular expressions."""

    action: Literal["mask", "block"] = "mask"
    """`mask` puts `[name]` in place of a match and lets the rest through; `block` refuses the
    request, or ends the answer with `finish_reason: content_filter`."""

    where: Literal["input", "output", "both"] = "both"
    """What is looked at: what clients send, what models answer, or both."""

    routes: tuple[str, ...] | None = None
    """Names of served models that it is for, as clients ask for them; all when null."""

    @model_validator(mode="after")
    def _finds_something(self) -> Guardrail:
        if not (self.pii or self.keywords or self.patterns):
            raise ValueError("give it keywords, patterns or pii, or leave it out")
        for pattern in self.patterns:
            try:
                found = re.compile(pattern).search("")
            except re.error as error:
                raise ValueError(
                    f"patterns: {pattern!r} is no regular expression: {error}"
                ) from error
            if found:
                raise ValueError(f"patterns: {pattern!r} also finds the empty text, everywhere")
        return self
