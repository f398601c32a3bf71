"""One request's way through keys, limits, budgets and the log, from its first byte to its last."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web
from sqlalchemy.engine import Engine

from tunesmith.config import UserError, require
from tunesmith.config.schema.serve import Serve
from tunesmith.serve.errors import ApiError
from tunesmith.serve.govern.governor import Governor, Grant, RefusedError
from tunesmith.serve.govern.journal import Ending, Entry, Journal, Purpose, read_spending
from tunesmith.serve.govern.keys import Key, KeyBook, read_book
from tunesmith.serve.govern.limits import Limits, Use
from tunesmith.serve.govern.measure import most_output_tokens
from tunesmith.serve.govern.metrics import Metrics
from tunesmith.serve.govern.usage import Ask, Usage
from tunesmith.serve.guard.rails import Rails, Screen
from tunesmith.serve.routes import Tables
from tunesmith.serve.upstream import Upstream

_DAY_S = 86_400
_REDACTION_S = 0.05
_NOTE_AFTER_S = 0.02


@dataclass(slots=True)
class Visit:
    """One request while it is open."""

    request_id: str
    method: str
    path: str
    key: Key | None
    ask: Ask
    route: str | None = None
    first: Upstream | None = None
    """The arm that was drawn."""

    arm: Upstream | None = None
    """Who was asked last: the arm, or one of the route's fallback."""

    failures: list[str] = field(default_factory=list)
    """Why each of those that gave no answer did not."""

    tried: int = 0
    """Upstreams that it came to."""

    sent_s: float | None = None
    """When the first of them was asked."""

    purpose: Purpose = "request"
    experiment: str | None = None
    """The rollout or shadow that pays for it, where that is no client."""

    at_s: float = field(default_factory=time.time)
    started_s: float = field(default_factory=time.perf_counter)
    first_piece_s: float | None = None
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    """As counted for each upstream before it started, where a limit asked for it."""

    is_sent: bool = False
    """Whether the engine has it."""

    usage: Usage = field(default_factory=Usage)
    screen: Screen | None = None
    """The guardrails that hold for it."""

    status: int = 0
    duration_s: float = 0.0
    ending: Ending = "disconnected"
    grant: Grant | None = None
    answer: bytes = b""
    """The answer's body, where the log keeps it."""


class Governance:
    """Everything that the gateway asks before, and notes after, a request.

    Limits are settled as soon as a request ends. The log, the metrics and the observers are told of
    several at a time, a moment later: so nobody's answer waits for that, and it takes less.
    """

    def __init__(
        self,
        section: Serve,
        engine: Engine,
        journal: Journal,
        tables: Tables,
    ) -> None:
        self.journal = journal
        self.metrics = Metrics(journal)
        self.observers: list[Callable[[Visit, Entry], None]] = []
        """Told of every request that has ended; they must not take long."""
        self._ended: list[tuple[Visit, Usage, bool, Use]] = []
        self.rails = Rails(section.guardrails, tables.table.routes)
        self.section, self.engine, self._tables = section, engine, tables
        self._book = read_book(engine)
        upstreams = list(tables.table.upstreams.values())
        day = int(time.time() // _DAY_S)
        self._governor = Governor(
            read_spending(engine, day), day, longest_wait_s=section.longest_budget_wait_s
        )
        regex = require("regex", "infer")
        self._patterns = [regex.compile(pattern) for pattern in section.log.redact]
        self._fastest_token_s: dict[str, float] = {}
        for key in self._book.keys.values():
            if key.state(time.time()) == "active" and (fault := _unpriced(key, upstreams)):
                raise UserError(f"serve: the key {key.id} ({key.name}) {fault}")

    def find(self, text: str) -> Key | None:
        """The active key that a client sent."""
        return self._book.find(text, time.time())

    def reload(self) -> KeyBook:
        """Read keys and groups again where they have changed; may run in a thread."""
        self._book = read_book(self.engine, self._book)
        return self._book

    async def admit(self, visit: Visit, upstreams: Mapping[str, tuple[Upstream, int]]) -> None:
        """Reserve the most that the request may use with any of the upstreams that may answer it,
        each with the longest prompt and answer that it takes. Raises ApiError when its key does
        not allow it."""
        if visit.key is None:
            return
        asked = visit.route or visit.ask.model
        if asked and not visit.key.may_ask(asked):
            allowed = ", ".join(visit.key.models)
            message = f"this key may not ask {asked!r}; it may ask {allowed}"
            raise ApiError(403, message, "model_not_allowed")
        if fault := _unpriced(visit.key, [one for one, _ in upstreams.values()]):
            raise ApiError(403, f"this key {fault}", "budget_without_price")
        subjects = visit.key.subjects
        need = Use()
        if any(limits.counts_tokens for limits in subjects.values()):
            for upstream, max_model_len in upstreams.values():
                prompt = upstream.measure.prompt_tokens(visit.ask)
                output = most_output_tokens(visit.ask, prompt, max_model_len)
                visit.prompt_tokens[upstream.name] = prompt
                one = _use(upstream, prompt, output)
                need = Use(max(need.tokens, one.tokens), max(need.nano_usd, one.nano_usd))
        try:
            visit.grant = await self._governor.admit(subjects, need)
        except RefusedError as error:
            raise _over_limit(error, subjects[error.subject]) from error

    @contextlib.contextmanager
    def visit(self, visit: Visit) -> Iterator[Visit]:
        """Settle and log the request when the block ends, however it ends."""
        try:
            yield visit
        except (ApiError, web.HTTPException) as error:
            visit.status, visit.ending = error.status, "refused"
            raise
        except Exception:
            visit.status, visit.ending = 500, "error"
            raise
        finally:
            self._close(visit)

    def refused(self, method: str, path: str, status: int) -> None:
        """Log a request that was turned away before it was anybody's."""
        visit = Visit(uuid.uuid4().hex, method, path, None, Ask(b""))
        visit.arm = self._tables.table.sole
        visit.status, visit.ending = status, "refused"
        self._close(visit)

    def _close(self, visit: Visit) -> None:
        visit.duration_s = time.perf_counter() - visit.started_s
        if visit.ending == "disconnected" and visit.usage.is_done:
            visit.status, visit.ending = 200, "error" if visit.usage.error else "complete"
        usage, is_estimated = self._final_usage(visit)
        used = _use(visit.arm, usage.prompt_tokens, usage.output_tokens)
        if visit.grant:
            self._governor.settle(visit.grant, used)
        if not self._ended:
            asyncio.get_running_loop().call_later(_NOTE_AFTER_S, self.note)
        self._ended.append((visit, usage, is_estimated, used))

    def note(self) -> None:
        """Tell the log, the metrics and the observers of what has ended since they were told."""
        ended, self._ended = self._ended, []
        for visit, usage, is_estimated, used in ended:
            self._note(visit, usage, is_estimated, used)

    def _note(self, visit: Visit, usage: Usage, is_estimated: bool, used: Use) -> None:
        days = {}
        if visit.grant and visit.key:
            day = int((visit.at_s + visit.duration_s) // _DAY_S)
            days = dict.fromkeys(visit.key.subjects, day)
        key, keeps = visit.key, self.keeps_payload
        entry = Entry(
            request_id=visit.request_id,
            response_id=_text(usage.response_id, 128),
            at_s=visit.at_s,
            key_id=key.id if key else None,
            key_name=key.name if key else None,
            group=key.group if key else None,
            method=_text(visit.method, 16) or "",
            path=_text(visit.path, 400) or "",
            model=_text(visit.ask.model, 200),
            artifact=visit.arm.artifact_id if visit.arm else None,
            status=visit.status,
            ending=visit.ending,
            finish_reason=_text(usage.finish_reason, 32),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            is_estimated=is_estimated,
            nano_usd=used.nano_usd if visit.arm and visit.arm.price else None,
            ttft_s=visit.first_piece_s,
            duration_s=visit.duration_s,
            request_body=self._payload(visit.ask.body) if keeps else None,
            response_body=self._payload(visit.answer) if keeps else None,
            guardrails=visit.screen.describe() if visit.screen else None,
            route=visit.route,
            arm=visit.arm.name if visit.arm and visit.route else None,
            version=visit.arm.model if visit.arm and visit.route else None,
            attempts=visit.tried,
            purpose=visit.purpose,
            experiment=visit.experiment,
        )
        self.journal.add(entry, days)
        self.metrics.observe(entry, visit.failures)
        for place, count in visit.screen.hits.items() if visit.screen else ():
            self.metrics.guarded(place, count)
        for observe in self.observers:
            observe(visit, entry)

    def _final_usage(self, visit: Visit) -> tuple[Usage, bool]:
        """What the engine said that was used. Of a whole answer that nobody waited for it says
        nothing: there it is the prompt, and as many tokens as it can have made in that time."""
        usage, arm = visit.usage, visit.arm
        if arm is None:
            return usage, False
        fastest_s = self._fastest_token_s.get(arm.name, math.inf)
        if usage.is_known:
            if not visit.ask.is_stream and usage.output_tokens and visit.ask.choices == 1:
                per_token_s = visit.duration_s / usage.output_tokens
                self._fastest_token_s[arm.name] = min(fastest_s, per_token_s)
            return usage, False
        is_left = visit.is_sent and not visit.status and visit.ending == "disconnected"
        if not (is_left or usage.pieces) or not visit.ask.fields:
            return usage, False
        prompt = visit.prompt_tokens.get(arm.name)
        usage.prompt_tokens = arm.measure.prompt_tokens(visit.ask) if prompt is None else prompt
        if visit.ask.is_stream:  # an engine that tells the tokens of pieces has told of each
            usage.output_tokens = usage.pieces
            return usage, True
        reserved = visit.grant.need.tokens - usage.prompt_tokens if visit.grant else 0
        most = visit.ask.most_output_tokens or max(0, reserved)
        usage.output_tokens = min(most, math.ceil(visit.duration_s / fastest_s))
        return usage, True

    @property
    def keeps_payload(self) -> bool:
        """Whether the log has the bodies of answers."""
        return self.section.log.payload

    def _payload(self, body: bytes) -> str:
        """Text for the log: the recipe's patterns are masked before it is cut to its size."""
        text = body.decode("utf-8", "replace")
        try:
            for pattern in self._patterns:
                text = pattern.sub("[redacted]", text, timeout=_REDACTION_S)
        except TimeoutError:
            return "[not kept: what to redact could not be found in time]"
        return text[: self.section.log.max_payload_characters]


def _text(found: str | None, most: int) -> str | None:
    """What a client or an engine says, as a database can keep it."""
    if found is None or (len(found) <= most and found.isascii()):
        return found
    return found[:most].encode("utf-8", "replace").decode()


def _use(upstream: Upstream | None, prompt_tokens: int, output_tokens: int) -> Use:
    price = upstream.price if upstream else None
    cost = price.nano_usd(prompt_tokens, output_tokens) if price else 0
    return Use(prompt_tokens + output_tokens, cost)


def _unpriced(key: Key, upstreams: Sequence[Upstream]) -> str | None:
    """Why a key cannot be held to its budget; None when it can, or has none."""
    unpriced = [one.name for one in upstreams if one.price is None]
    if not unpriced or all(one.usd_per_day is None for one in key.subjects.values()):
        return None
    return (
        f"has a budget in USD, and nothing says what a token costs of {unpriced[0]}: give "
        "serve.token_price, or measure it with tunesmith bench batch and price.gpu_hour_usd"
    )


def _over_limit(error: RefusedError, limits: Limits) -> ApiError:
    """What a client is told."""
    (kind, name), refusal = error.subject, error.refusal
    whose = "this key" if kind == "key" else f"the group {name}"
    text = f"{refusal.limit} of {whose} is {limits.given()[refusal.limit]:g}"
    if refusal.retry_after_s is None:
        text += ", and this request alone may use more; ask for less with max_tokens"
        return ApiError(429, text, refusal.limit)
    wait_s = str(refusal.retry_after_s)
    text += f", and it is used up; try again in {wait_s} s"
    return ApiError(429, text, refusal.limit, {"Retry-After": wait_s})
