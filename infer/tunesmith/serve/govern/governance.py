"""One request's way through keys, limits, budgets and the log, from its first byte to its last."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from aiohttp import web
from sqlalchemy.engine import Engine

from tunesmith.config import UserError, require
from tunesmith.config.schema.serve import Serve
from tunesmith.serve.errors import ApiError
from tunesmith.serve.govern.governor import Governor, Grant, RefusedError
from tunesmith.serve.govern.journal import Ending, Entry, Journal, read_spending
from tunesmith.serve.govern.keys import Key, KeyBook, read_book
from tunesmith.serve.govern.limits import Limits, Use
from tunesmith.serve.govern.measure import Measure, most_output_tokens
from tunesmith.serve.govern.metrics import Metrics
from tunesmith.serve.govern.price import TokenPrice
from tunesmith.serve.govern.usage import Ask, Usage
from tunesmith.serve.guard.rails import Rails, Screen

_DAY_S = 86_400
_REDACTION_S = 0.05


@dataclass
class Visit:
    """One request while it is open."""

    request_id: str
    method: str
    path: str
    key: Key | None
    ask: Ask
    at_s: float = field(default_factory=time.time)
    started_s: float = field(default_factory=time.perf_counter)
    first_piece_s: float | None = None
    prompt_tokens: int | None = None
    """As counted before it started, where a limit asked for it."""

    is_sent: bool = False
    """Whether the engine has it."""

    usage: Usage = field(default_factory=Usage)
    screen: Screen | None = None
    """The guardrails that hold for it."""

    status: int = 0
    ending: Ending = "disconnected"
    grant: Grant | None = None
    answer: bytes = b""
    """The answer's body, where the log keeps it."""


class Governance:
    """Everything that the gateway asks before, and notes after, a request."""

    def __init__(
        self,
        section: Serve,
        engine: Engine,
        journal: Journal,
        measure: Measure,
        *,
        artifact_id: str,
        price: TokenPrice | None,
    ) -> None:
        self.journal = journal
        self.metrics = Metrics(journal)
        self.observers: list[Callable[[Visit, Entry], None]] = []
        """Told of every request that has ended; they must not take long."""
        self.rails = Rails(section.guardrails)
        self.price = price
        self.section, self._engine, self._measure = section, engine, measure
        self._artifact_id = artifact_id
        self._book = read_book(engine)
        day = int(time.time() // _DAY_S)
        self._governor = Governor(
            read_spending(engine, day), day, longest_wait_s=section.longest_budget_wait_s
        )
        regex = require("regex", "infer")
        self._patterns = [regex.compile(pattern) for pattern in section.log.redact]
        self._fastest_token_s = math.inf
        for key in self._book.keys.values():
            if key.state(time.time()) == "active" and (fault := self._unpriced(key)):
                raise UserError(f"serve: the key {key.id} ({key.name}) {fault}")

    def find(self, text: str) -> Key | None:
        """The active key that a client sent."""
        return self._book.find(text, time.time())

    def reload(self) -> KeyBook:
        """Read keys and groups again where they have changed; may run in a thread."""
        self._book = read_book(self._engine, self._book)
        return self._book

    async def admit(self, visit: Visit, max_model_len: int) -> None:
        """Reserve what the request may use. Raises ApiError when its key does not allow it."""
        if visit.key is None:
            return
        if visit.ask.model and not visit.key.may_ask(visit.ask.model):
            allowed = ", ".join(visit.key.models)
            message = f"this key may not ask {visit.ask.model!r}; it may ask {allowed}"
            raise ApiError(403, message, "model_not_allowed")
        if fault := self._unpriced(visit.key):
            raise ApiError(403, f"this key {fault}", "budget_without_price")
        subjects = visit.key.subjects
        need = Use()
        if any(limits.counts_tokens for limits in subjects.values()):
            visit.prompt_tokens = self._measure.prompt_tokens(visit.ask)
            output = most_output_tokens(visit.ask, visit.prompt_tokens, max_model_len)
            need = self._use(visit.prompt_tokens, output)
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
        visit.status, visit.ending = status, "refused"
        self._close(visit)

    def _close(self, visit: Visit) -> None:
        duration_s = time.perf_counter() - visit.started_s
        if visit.ending == "disconnected" and visit.usage.is_done:
            visit.status, visit.ending = 200, "error" if visit.usage.error else "complete"
        usage, is_estimated = self._final_usage(visit, duration_s)
        used = self._use(usage.prompt_tokens, usage.output_tokens)
        days = {}
        if visit.grant:
            self._governor.settle(visit.grant, used)
            assert visit.key
            day = int(time.time() // _DAY_S)
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
            artifact=self._artifact_id,
            status=visit.status,
            ending=visit.ending,
            finish_reason=_text(usage.finish_reason, 32),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            is_estimated=is_estimated,
            nano_usd=used.nano_usd if self.price else None,
            ttft_s=visit.first_piece_s,
            duration_s=duration_s,
            request_body=self._payload(visit.ask.body) if keeps else None,
            response_body=self._payload(visit.answer) if keeps else None,
            guardrails=visit.screen.describe() if visit.screen else None,
        )
        self.journal.add(entry, days)
        self.metrics.observe(entry)
        for place, count in visit.screen.hits.items() if visit.screen else ():
            self.metrics.guarded(place, count)
        for observe in self.observers:
            observe(visit, entry)

    def _final_usage(self, visit: Visit, duration_s: float) -> tuple[Usage, bool]:
        """What the engine said that was used. Of a whole answer that nobody waited for it says
        nothing: there it is the prompt, and as many tokens as it can have made in that time."""
        usage = visit.usage
        if usage.is_known:
            if not visit.ask.is_stream and usage.output_tokens and visit.ask.choices == 1:
                per_token_s = duration_s / usage.output_tokens
                self._fastest_token_s = min(self._fastest_token_s, per_token_s)
            return usage, False
        is_left = visit.is_sent and not visit.status and visit.ending == "disconnected"
        if not is_left or not visit.ask.fields:
            return usage, False
        prompt = visit.prompt_tokens
        usage.prompt_tokens = self._measure.prompt_tokens(visit.ask) if prompt is None else prompt
        if visit.ask.is_stream:  # nothing was made yet, or the engine would have said so
            return usage, True
        reserved = visit.grant.need.tokens - usage.prompt_tokens if visit.grant else 0
        most = visit.ask.most_output_tokens or max(0, reserved)
        usage.output_tokens = min(most, math.ceil(duration_s / self._fastest_token_s))
        return usage, True

    def _use(self, prompt_tokens: int, output_tokens: int) -> Use:
        cost = self.price.nano_usd(prompt_tokens, output_tokens) if self.price else 0
        return Use(prompt_tokens + output_tokens, cost)

    def _unpriced(self, key: Key) -> str | None:
        limits: Sequence[float | None] = [one.usd_per_day for one in key.subjects.values()]
        if self.price or all(limit is None for limit in limits):
            return None
        return (
            "has a budget in USD, and nothing says what a token costs: give serve.token_price, or "
            "measure it with tunesmith bench batch and price.gpu_hour_usd"
        )

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
    return None if found is None else found[:most].encode("utf-8", "replace").decode()


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
