"""Questions with checks, which both arms of a rollout answer while there is room to spare."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tunesmith.config import DataError, UserError
from tunesmith.serve.background import ask
from tunesmith.serve.client import Client
from tunesmith.serve.govern.governance import Governance, Visit
from tunesmith.serve.govern.usage import read_ask
from tunesmith.serve.upstream import Upstream

_MAX_TOKENS = 256


class Probe(BaseModel):
    """One line of the file: a prompt or messages, and what a good answer is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    exact: str | None = None
    regex: re.Pattern[str] | None = None
    contains: str | None = None
    max_tokens: int = _MAX_TOKENS

    @model_validator(mode="after")
    def _asks_and_checks(self) -> Probe:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        if sum(one is not None for one in (self.exact, self.regex, self.contains)) != 1:
            raise ValueError("give one of exact, regex and contains")
        return self

    def passes(self, answer: str) -> bool:
        """Whether an answer is good."""
        if self.exact is not None:
            return answer.strip() == self.exact.strip()
        if self.regex is not None:
            return self.regex.search(answer) is not None
        return str(self.contains) in answer

    def request(self) -> tuple[str, dict[str, Any]]:
        """The path, and the body less its model."""
        body: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0}
        if self.messages is not None:
            return "chat/completions", body | {"messages": list(self.messages)}
        return "completions", body | {"prompt": self.prompt}


def read_probes(path: Path | None) -> tuple[Probe, ...]:
    """All of a file; none where there is no file. Raises UserError or DataError naming the line."""
    if path is None:
        return ()
    if not path.is_file():
        raise UserError(f"serve.rollout.probes: no such file: {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(Probe.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{path}:{number}: {where} {first['msg']}".replace(": ", ": ")
            ) from error
    if not found:
        raise DataError(f"{path} has no probe")
    return tuple(found)


async def passes(
    client: Client,
    governance: Governance,
    probe: Probe,
    upstream: Upstream,
    *,
    route: str,
    experiment: str,
) -> bool:
    """Whether an upstream answers a probe well."""
    path, fields = probe.request()
    body = json.dumps({"model": upstream.model, **fields}).encode()
    visit = Visit(uuid.uuid4().hex, "POST", path, None, read_ask(path, body))
    visit.route, visit.purpose, visit.experiment = route, "probe", experiment
    answer = await ask(client, governance, visit, upstream)
    return probe.passes(_text(answer))


def _text(answer: bytes) -> str:
    """What a whole answer says; empty where it is none."""
    try:
        choice = json.loads(answer)["choices"][0]
        found = choice["text"] if "text" in choice else choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""
