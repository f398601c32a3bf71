"""A row's result as columns beside those of the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.batch.results import output_tokens
from tunesmith.batch.rows import Row
from tunesmith.config.schema.batch import Batch


@dataclass(frozen=True)
class Origin:
    """Where the answers of a job come from."""

    model: str
    """Id of the artifact that answers."""

    adapters: Mapping[str, str] = field(default_factory=dict)
    """By the name that rows ask for, the id (or the folder) of an adapter."""

    usd_per_s: float | None = None
    """Price of a second of the devices."""

    created: int = 0
    """Unix time, in seconds, that answers in the OpenAI form carry."""

    fingerprint: str | None = None
    """The engine and its version, which those carry too."""

    def of(self, row: Row) -> str:
        """The artifact that answers a row."""
        name = row.ask.adapter
        return self.model if name is None else self.adapters.get(name, self.model)


def output_row(
    row: Row, result: Mapping[str, Any], section: Batch, origin: Origin
) -> dict[str, Any]:
    """The result, then the input's columns; one that has a result's name gets `input_` before
    it."""
    error = result.get("error")
    seconds = result.get("device_s")
    cost = None if origin.usd_per_s is None or seconds is None else seconds * origin.usd_per_s
    made = {
        "id": row.id,
        **_content(result, section, row),
        "prompt_tokens": result.get("prompt_tokens"),
        "cached_tokens": result.get("cached_tokens"),
        "output_tokens": None if error else output_tokens(result),
        "cost_usd": cost,
        "model": None if error else origin.of(row),
        "error": error,
    }
    kept = {
        f"input_{name}" if name in made else name: value
        for name, value in row.columns.items()
        if name != section.id_column or name != "id"
    }
    return made | kept


def _content(result: Mapping[str, Any], section: Batch, row: Row) -> dict[str, Any]:
    """What the task is for."""
    match section.task:
        case "embed":
            embeddings = result.get("embeddings")
            return {"embedding": embeddings[0] if embeddings else None}
        case "classify":
            return _classes(result.get("scores"), section.labels or ())
        case "score":
            scores = result.get("scores")
            return {
                "logprob": math.fsum(scores[0]) if scores else None,
                "scored_tokens": len(scores[0]) if scores else None,
            }
    outputs = result.get("outputs") or []
    made: dict[str, Any] = {
        "answer": outputs[0]["text"] if outputs else None,
        "finish_reason": outputs[0]["finish_reason"] if outputs else None,
    }
    if section.n > 1:
        made["answers"] = [output["text"] for output in outputs] if outputs else None
        made["finish_reasons"] = (
            [output["finish_reason"] for output in outputs] if outputs else None
        )
    return made


def _classes(scores: list[list[float]] | None, labels: tuple[str, ...]) -> dict[str, Any]:
    """The likeliest label, and the probability of each when it is one of them."""
    if scores is None:
        return {"answer": None, "probabilities": None, "logprobs": None}
    totals = [math.fsum(tokens) for tokens in scores]
    most = max(totals)
    shares = [math.exp(total - most) for total in totals]
    whole = math.fsum(shares)
    return {
        "answer": labels[totals.index(most)],
        "probabilities": {
            label: share / whole for label, share in zip(labels, shares, strict=True)
        },
        "logprobs": dict(zip(labels, totals, strict=True)),
    }
