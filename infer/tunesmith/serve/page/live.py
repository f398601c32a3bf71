"""What has happened lately, kept in memory for the page; of fixed size whatever happens."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.serve.govern.governance import Visit
from tunesmith.serve.govern.journal import Entry
from tunesmith.serve.govern.limits import NANO

SECONDS = 120
"""How far back rates go."""

_RECENT = 200
_SAMPLES = 16
"""Times to the first piece that are kept of one second."""

_MOST_KEYS = 64
_MOST_COSTS = 512
_RATE_S = 10
_OTHERS = "others"


@dataclass
class _Second:
    at_s: int
    requests: int = 0
    errors: int = 0
    output_tokens: int = 0
    nano_usd: int = 0
    ttft_s: list[float] = field(default_factory=list)


class _Series:
    """One line of seconds."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=SECONDS)

    def add(self, entry: Entry, now_s: float) -> None:
        if not self._seconds or self._seconds[-1].at_s != int(now_s):
            self._seconds.append(_Second(int(now_s)))
        second = self._seconds[-1]
        second.requests += 1
        second.errors += entry.status >= 500
        second.output_tokens += entry.output_tokens
        second.nano_usd += entry.nano_usd or 0
        if entry.ttft_s is not None and len(second.ttft_s) < _SAMPLES:
            second.ttft_s.append(entry.ttft_s)

    def state(self, now_s: float) -> dict[str, Any]:
        """Seconds that are over, oldest first, and what they come to now."""
        first = int(now_s) - SECONDS
        found = {one.at_s: one for one in self._seconds}
        line = [found.get(first + at) or _Second(first + at) for at in range(SECONDS)]
        last = line[-_RATE_S:]
        waits = [wait for one in line[-60:] for wait in one.ttft_s]
        return {
            "requests": [one.requests for one in line],
            "output_tokens": [one.output_tokens for one in line],
            "usd": [one.nano_usd / NANO for one in line],
            "ttft_ms": [_ms(_quantile(one.ttft_s, 0.5)) for one in line],
            "requests_per_s": sum(one.requests for one in last) / _RATE_S,
            "errors_per_s": sum(one.errors for one in last) / _RATE_S,
            "tokens_per_s": sum(one.output_tokens for one in last) / _RATE_S,
            "ttft_p50_ms": _ms(_quantile(waits, 0.5)),
            "ttft_p95_ms": _ms(_quantile(waits, 0.95)),
        }


@dataclass
class _Cost:
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    nano_usd: int | None = None


class Live:
    """Told of every request that has ended; a key sees its own alone."""

    def __init__(self) -> None:
        self.began_s = time.time()
        self._all = _Series()
        self._by_key: OrderedDict[str, _Series] = OrderedDict()
        self._costs: dict[tuple[str | None, str | None, str | None], _Cost] = {}
        self._recent: deque[Entry] = deque(maxlen=_RECENT)

    def observe(self, visit: Visit, entry: Entry) -> None:
        """Take one request; cheap, as it is on the way of each."""
        if visit.purpose != "request":
            return
        now_s = time.time()
        self._all.add(entry, now_s)
        if entry.key_id is not None:
            if entry.key_id not in self._by_key and len(self._by_key) >= _MOST_KEYS:
                self._by_key.popitem(last=False)
            series = self._by_key.setdefault(entry.key_id, _Series())
            self._by_key.move_to_end(entry.key_id)
            series.add(entry, now_s)
        if entry.ending != "refused":
            self._charge(entry)
        # The bodies are for the log; here they would only take room.
        self._recent.append(_without_bodies(entry))

    def state(self, key_id: str | None) -> dict[str, Any]:
        """For the owner of a key, or (None) for whoever runs the gateway."""
        now_s = time.time()
        series = self._all if key_id is None else self._by_key.get(key_id, _Series())
        recent = [one for one in self._recent if key_id in (None, one.key_id)]
        costs = [one for one in self._costs.items() if key_id in (None, one[0][0])]
        return {
            "scope": "all" if key_id is None else "key",
            "now_s": now_s,
            "began_s": self.began_s,
            "rates": series.state(now_s),
            "costs": sorted(map(_cost_line, costs), key=lambda line: -(line["usd"] or 0)),
            "recent": [_recent_line(one) for one in reversed(recent)][:50],
        }

    def _charge(self, entry: Entry) -> None:
        place = (entry.key_id, entry.key_name, entry.route or entry.model)
        if place not in self._costs and len(self._costs) >= _MOST_COSTS:
            place = (_OTHERS, _OTHERS, _OTHERS)
        cost = self._costs.setdefault(place, _Cost())
        cost.requests += 1
        cost.prompt_tokens += entry.prompt_tokens
        cost.output_tokens += entry.output_tokens
        if entry.nano_usd is not None:
            cost.nano_usd = (cost.nano_usd or 0) + entry.nano_usd


def _without_bodies(entry: Entry) -> Entry:
    if entry.request_body is None:
        return entry
    fields = {**vars(entry), "request_body": None, "response_body": None}
    return Entry(**fields)


def _cost_line(item: tuple[tuple[str | None, str | None, str | None], _Cost]) -> dict[str, Any]:
    (key_id, key_name, model), cost = item
    return {
        "key": key_name or key_id,
        "model": model,
        "requests": cost.requests,
        "prompt_tokens": cost.prompt_tokens,
        "output_tokens": cost.output_tokens,
        "usd": None if cost.nano_usd is None else cost.nano_usd / NANO,
    }


def _recent_line(entry: Entry) -> dict[str, Any]:
    names = (
        "at_s", "request_id", "response_id", "method", "path", "model", "arm", "artifact",
        "status", "ending", "finish_reason", "prompt_tokens", "output_tokens",
    )  # fmt: skip
    return {
        **{name: getattr(entry, name) for name in names},
        "key": entry.key_name or entry.key_id,
        "ttft_ms": _ms(entry.ttft_s),
        "duration_ms": _ms(entry.duration_s),
        "usd": None if entry.nano_usd is None else entry.nano_usd / NANO,
        "guardrails": _rules(entry.guardrails),
    }


def _rules(found: str | None) -> list[str]:
    return [] if found is None else [f"{one['rule']} {one['where']}" for one in json.loads(found)]


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s * 1e3, 1)


def total_usd(lines: Iterable[dict[str, Any]]) -> float | None:
    """What the lines come to; None where nothing has a price."""
    priced = [line["usd"] for line in lines if line["usd"] is not None]
    return sum(priced) if priced else None
