"""Counters for Prometheus. Names of keys stay out of them: who used what is in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.config import require
from tunesmith.serve.govern.limits import NANO

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.serve.govern.journal import Entry, Journal
    from tunesmith.serve.upstream import Upstream

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One registry per gateway, so that two in a process do not share counters."""

    def __init__(self, journal: Journal) -> None:
        prometheus = require("prometheus_client", "infer")
        self._text = prometheus.generate_latest
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "tunesmith_requests", "Requests by status and ending.", ("status", "ending"),
            registry=registry,
        )  # fmt: skip
        tokens = prometheus.Counter(
            "tunesmith_tokens", "Tokens of prompts, of those the cached ones, and of answers.",
            ("kind",), registry=registry,
        )  # fmt: skip
        self._prompt, self._cached, self._output = map(
            tokens.labels, ("prompt", "cached", "output")
        )
        self._usd = prometheus.Counter("tunesmith_usd", "Cost of requests.", registry=registry)
        self._ttft = prometheus.Histogram(
            "tunesmith_ttft_seconds", "Time to the first piece of a stream.",
            buckets=_TTFT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._duration = prometheus.Histogram(
            "tunesmith_request_seconds", "Time to the end of an answer.",
            buckets=_DURATION_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._guarded = prometheus.Counter(
            "tunesmith_guardrail_matches", "What guardrails found.", ("rule", "where", "action"),
            registry=registry,
        )  # fmt: skip
        dropped = prometheus.Gauge(
            "tunesmith_log_dropped", "Lines of the request log that are lost.", registry=registry
        )
        dropped.set_function(lambda: journal.dropped)
        self._open = prometheus.Gauge(
            "tunesmith_open_requests", "Requests that are being answered.", registry=registry
        )
        self._ready = prometheus.Gauge(
            "tunesmith_ready", "Whether requests are answered.", registry=registry
        )

        self._arms = prometheus.Counter(
            "tunesmith_arm_requests", "Requests by route, the upstream that answered, and ending.",
            ("route", "arm", "purpose", "ending"), registry=registry,
        )  # fmt: skip
        self._fallbacks = prometheus.Counter(
            "tunesmith_fallbacks", "Times that the next upstream was asked, and why.",
            ("route", "reason"), registry=registry,
        )  # fmt: skip
        self._shadows_dropped = prometheus.Counter(
            "tunesmith_shadows_dropped", "Copies not made because the second model was busy.",
            ("route",), registry=registry,
        )  # fmt: skip
        self._upstream_ready = prometheus.Gauge(
            "tunesmith_upstream_ready", "Whether an upstream answers.", ("upstream",),
            registry=registry,
        )  # fmt: skip
        self._upstream_open = prometheus.Gauge(
            "tunesmith_upstream_open_requests", "Requests open at an upstream.", ("upstream",),
            registry=registry,
        )  # fmt: skip

    def drop_shadow(self, route: str) -> None:
        """Count a copy that was not made."""
        self._shadows_dropped.labels(route).inc()

    def observe(self, entry: Entry, failures: Sequence[str] = ()) -> None:
        """Count a request that has ended, after upstreams that failed for these reasons."""
        if entry.route:
            self._arms.labels(entry.route, entry.arm, entry.purpose, entry.ending).inc()
            for reason in failures[: entry.attempts - 1]:
                self._fallbacks.labels(entry.route, reason).inc()
        self._prompt.inc(entry.prompt_tokens)
        self._cached.inc(entry.cached_tokens)
        self._output.inc(entry.output_tokens)
        self._usd.inc((entry.nano_usd or 0) / NANO)
        if entry.purpose != "request":
            return
        self._requests.labels(str(entry.status), entry.ending).inc()
        if entry.ttft_s is not None:
            self._ttft.observe(entry.ttft_s)
        if entry.ending != "refused":
            self._duration.observe(entry.duration_s)

    def guarded(self, place: tuple[str, str, str], count: int) -> None:
        """Count what a guardrail found: by rule, input or output, and action."""
        self._guarded.labels(*place).inc(count)

    def text(
        self, *, open_requests: int, is_ready: bool, upstreams: Iterable[Upstream] = ()
    ) -> bytes:
        """The exposition format."""
        self._upstream_ready.clear()
        self._upstream_open.clear()
        for one in upstreams:
            self._upstream_ready.labels(one.name).set(one.place.is_ready)
            self._upstream_open.labels(one.name).set(one.open)
        self._open.set(open_requests)
        self._ready.set(is_ready)
        found: bytes = self._text(self._registry)
        return found
