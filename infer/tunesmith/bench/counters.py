"""The engine's own counters, read before and after a phase to check what the client saw."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

_LINE = re.compile(r"^(?P<name>vllm:\w+)(?:\{[^}]*\})? (?P<value>\S+)$", re.MULTILINE)
_STEPS = "iteration_tokens_total_count"


@dataclass(frozen=True)
class Counters:
    """Totals since the engine started, or over a phase when subtracted. Units: tokens."""

    prompt_tokens: float
    generation_tokens: float
    prefix_cache_queries: float
    prefix_cache_hits: float
    num_preemptions: float
    """Requests that lost their place in the key-value cache and were computed again."""
    steps: float = 0.0
    """Passes through the model; 0 where the engine does not say."""

    @classmethod
    def parse(cls, text: str) -> Counters:
        """From the text of `/metrics`. Raises ValueError when a counter is missing."""
        totals: dict[str, float] = {}
        for match in _LINE.finditer(text):
            name = match["name"].removeprefix("vllm:").removesuffix("_total")
            totals[name] = totals.get(name, 0.0) + float(match["value"])
        totals["steps"] = totals.get(_STEPS, 0.0)
        wanted = [field.name for field in fields(cls)]
        if missing := [name for name in wanted if name not in totals]:
            raise ValueError(f"the engine publishes no {', '.join(missing)}")
        return cls(**{name: totals[name] for name in wanted})

    def __sub__(self, before: Counters) -> Counters:
        return Counters(
            **{
                field.name: getattr(self, field.name) - getattr(before, field.name)
                for field in fields(self)
            }
        )

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that the prefix cache answered."""
        return self.prefix_cache_hits / max(1.0, self.prefix_cache_queries)
