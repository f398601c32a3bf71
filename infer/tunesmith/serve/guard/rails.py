"""The guardrails of a gateway, and one request's way through them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from tunesmith.config import UserError
from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.serve.errors import ApiError
from tunesmith.serve.govern.usage import Ask, read_ask
from tunesmith.serve.guard.bodies import (
    change_answer,
    change_texts,
    filtered_answer,
    has_token_ids,
)
from tunesmith.serve.guard.scan import Found, Matcher, compile_rail, mask
from tunesmith.serve.guard.stream import StreamMask

Where = Literal["input", "output"]
Hits = Counter[tuple[str, Where, str]]
"""How often, by rule, place and action."""

BUDGET_S = 0.5
"""Time that the patterns may take for a request's body, and again for each answer's piece."""

_INLINE_S = 0.005
_INLINE_BYTES = 32_768
"""Up to this the event loop does it itself; more, or slower, is for a thread."""

_THREADS = 2

CUT = "content_filter"
"""Why an answer ended that was ended here."""

_CHECKED = ("chat/completions", "completions", "responses", "embeddings")
_T = TypeVar("_T")


class Rails:
    """Compiled once for a gateway."""

    def __init__(self, rails: Iterable[Guardrail], routes: Collection[str]) -> None:
        self._rails = [(rail, compile_rail(rail)) for rail in rails]
        # Of their own, so that slow texts wait for each other and nothing else does.
        self._threads = ThreadPoolExecutor(_THREADS, "guardrails")
        for rail, _ in self._rails:
            for name in rail.routes or ():
                if name not in routes:
                    raise UserError(
                        f"serve.guardrails: {rail.name}: there is no route {name!r}; "
                        f"there is {', '.join(routes)}"
                    )

    def of(self, route: str) -> Screen | None:
        """What holds for a route; None where nothing does."""
        sides: dict[Where, list[Matcher]] = {"input": [], "output": []}
        for rail, matchers in self._rails:
            if rail.routes is None or route in rail.routes:
                for where in sides:
                    if rail.where in (where, "both"):
                        sides[where] += matchers
        if not any(sides.values()):
            return None
        return Screen(sides["input"], sides["output"], self._threads)


class Screen:
    """The guardrails of one request."""

    def __init__(
        self, entering: Sequence[Matcher], leaving: Sequence[Matcher], threads: Executor
    ) -> None:
        self._entering, self._leaving, self._threads = entering, leaving, threads
        self._stream: StreamMask | None = None
        self.hits: Hits = Counter()
        self.cuts = False
        """Whether an answer was ended."""

    def describe(self) -> str | None:
        """What was found, for the log: never the text."""
        if not self.hits:
            return None
        names = ("rule", "where", "action", "count")
        return json.dumps([dict(zip(names, (*k, n), strict=True)) for k, n in self.hits.items()])

    @property
    def checks_answers(self) -> bool:
        """Whether an answer has to go through here."""
        return bool(self._leaving)

    async def enter(self, path: str, method: str, ask: Ask) -> Ask:
        """The request as it may go on. Raises ApiError where it may not."""
        if path not in _CHECKED or method != "POST":
            message = "guardrails are on, and they cannot look into what goes through this path"
            raise ApiError(403, message, "guardrail")
        if not self._entering:
            return ask
        if has_token_ids(ask.fields):
            message = "guardrails are on, so send texts: they cannot look into token ids"
            raise ApiError(400, message, "guardrail")
        found: list[Found] = []

        def work(deadline_s: float) -> Any:
            found.clear()
            return change_texts(ask.fields, _changer(self._entering, found, deadline_s))

        try:
            fields = await self._in_time(work, len(ask.body))
        except TimeoutError:
            self.hits["timeout", "input", "block"] += 1
            raise ApiError(400, "this text takes too long to check", "guardrail") from None
        self._count(found, "input")
        if blocked := next((one for one in found if one.matcher.blocks), None):
            message = f"refused by the guardrail {blocked.matcher.rule}"
            raise ApiError(400, message, "content_filter")
        return read_ask(path, json.dumps(fields).encode()) if found else ask

    async def whole(self, body: bytes) -> bytes:
        """An answer that is no stream."""
        try:
            answer = json.loads(body)
        except ValueError:
            return body
        if not isinstance(answer, dict):
            return body
        found: list[Found] = []

        def work(deadline_s: float) -> Any:
            found.clear()
            return change_answer(answer, _changer(self._leaving, found, deadline_s))

        try:
            changed = await self._in_time(work, len(body))
        except TimeoutError:
            self.hits["timeout", "output", "block"] += 1
            self.cuts = True
            return json.dumps(filtered_answer(answer)).encode()
        self._count(found, "output")
        if any(one.matcher.blocks for one in found):
            self.cuts = True
            changed = filtered_answer(answer)
        return body if changed == answer else json.dumps(changed).encode()

    async def feed(self, events: bytes, *, is_last: bool = False) -> bytes:
        """Whole events of a stream."""
        before = self._stream or StreamMask(self._leaving)

        def work(deadline_s: float) -> tuple[StreamMask, bytes]:
            after = before.copied()
            return after, after.feed(events, deadline_s, is_last=is_last)

        try:
            stream, passed = await self._in_time(work, len(events))
        except TimeoutError:
            self.hits["timeout", "output", "block"] += 1
            stream, passed = before, before.cut()
        self._stream = stream
        self._count(stream.found, "output")
        self.cuts = stream.cuts
        return passed

    async def _in_time(self, work: Callable[[float], _T], size: int) -> _T:
        """Small work at once; what turns out to be slow again in a thread, where it holds up
        nobody. `work` gets its deadline, and raises TimeoutError without having changed anything.
        """
        if size <= _INLINE_BYTES:
            try:
                return work(time.monotonic() + _INLINE_S)
            except TimeoutError:
                pass
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(time.monotonic() + BUDGET_S))

    def _count(self, found: Iterable[Found], where: Where) -> None:
        for one in found:
            self.hits[one.matcher.rule, where, "block" if one.matcher.blocks else "mask"] += 1


def _changer(
    matchers: Sequence[Matcher], found: list[Found], deadline_s: float
) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed, scanner = mask(text, matchers, deadline_s)
        found.extend(scanner.found)
        return changed

    return change
