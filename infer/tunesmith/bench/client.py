"""One streamed request, with the moment of every token. Nothing here decides when to send."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

_TERMINAL = ("stop", "length")  # how an answer ends when nothing went wrong
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Sample:
    """What the client saw of one request; seconds count from the start of its phase."""

    index: int
    intended_s: float
    """When the schedule wanted it sent. Latencies count from here: a request that waits for a
    busy client waits as its user would."""
    sent_s: float
    ended_s: float
    piece_s: tuple[float, ...]
    """When each piece of the answer arrived."""
    piece_tokens: tuple[int, ...]
    """Tokens in each piece."""
    input_tokens: int
    output_tokens: int
    """Both as the engine's final usage record says."""
    finish_reason: str | None
    error: str | None
    """Why it does not count as answered; None when it does."""
    asked_tokens: int | None = None
    """Output tokens that were asked for."""
    prompt_tokens: int | None = None
    """Tokens of the prompt where the client made it of tokens."""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.piece_s[0] - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first piece; None when all came at once."""
        later = self.output_tokens - self.piece_tokens[0]
        return (self.piece_s[-1] - self.piece_s[0]) / later if later else None

    @property
    def itl_s(self) -> list[float]:
        """Times between the pieces of the answer, as its reader sees them."""
        return [later - earlier for earlier, later in pairwise(self.piece_s)]

    @property
    def e2e_s(self) -> float:
        """Time to the end of the answer."""
        return self.ended_s - self.intended_s


class Recording:
    """The stream of one answer as it is read."""

    def __init__(self) -> None:
        self.piece_s: list[float] = []
        self.piece_tokens: list[int] = []
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.done = False
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in bytes as they arrived; lines may be cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            detail = event["error"]
            self.error = str(detail.get("message", detail) if isinstance(detail, dict) else detail)
            return
        for choice in event.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := event.get("usage"):
            new = usage["completion_tokens"] - sum(self.piece_tokens)
            self.usage = usage
            # The engine opens a stream with an empty piece: that is not the first token.
            if new:
                self.piece_s.append(now_s)
                self.piece_tokens.append(new)

    def fault(self) -> str | None:
        """Why the answer is not a whole one; None when it is."""
        if self.error:
            return f"the stream carried an error: {self.error}"
        if self.finish_reason is None or not self.done:
            return "the stream ended before the answer did"
        if self.finish_reason not in _TERMINAL:
            return f"the answer ended with finish_reason {self.finish_reason}"
        if self.usage is None or not self.piece_s:
            return "the stream carried no usage"
        return None


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    *,
    index: int,
    intended_s: float,
    origin_s: float,
) -> Sample:
    """Send one request now and read its answer to the end. Never raises for a failed request."""
    recording, error = Recording(), None
    sent_s = time.perf_counter() - origin_s
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                error = f"HTTP {response.status}: {(await response.text())[:300]}"
            else:
                async for data in response.content.iter_any():
                    recording.feed(data, time.perf_counter() - origin_s)
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TimeoutError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    ended_s = time.perf_counter() - origin_s
    usage = recording.usage or {}
    prompt = body.get("prompt")
    return Sample(
        index=index,
        intended_s=intended_s,
        sent_s=sent_s,
        ended_s=ended_s,
        piece_s=tuple(recording.piece_s),
        piece_tokens=tuple(recording.piece_tokens),
        input_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
        finish_reason=recording.finish_reason,
        error=error or recording.fault(),
        asked_tokens=body.get("max_tokens"),
        prompt_tokens=len(prompt) if isinstance(prompt, list) else None,
    )


def open_session() -> aiohttp.ClientSession:
    """A session without a limit on connections: waiting for one would hide in the latencies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    )
