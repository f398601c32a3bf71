"""What is asked: held-out rows, random tokens of given lengths, or the requests of a log.

A mix is fixed before the load starts, so that every variant gets the same work.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.config import DataError, require
from tunesmith.config.schema.bench import Bench
from tunesmith.pipeline.bench import log_files

_LONGEST_TEXT = 1000  # characters of a document that are given as the prompt to continue
_ENDPOINTS = ("chat/completions", "completions")
_LOG_COLUMNS = ["path", "status", "prompt_tokens", "output_tokens", "request_body"]


@dataclass(frozen=True)
class Prompt:
    """One thing to ask, as an endpoint of the OpenAI API and the part of its body that asks it."""

    endpoint: str
    """`chat/completions` or `completions`."""

    body: dict[str, Any]

    max_tokens: int | None = None
    """Tokens to answer with; as `bench.max_tokens` says when None."""

    random_tokens: int | None = None
    """Make the prompt of this many random tokens; `body` has none of its own then."""

    def salted(self, salt: str) -> Prompt:
        """The same question with a first word that no other request has.

        Engines keep the work done for a beginning they have seen, so a prompt sent twice measures
        that memory. The salt comes first because only what follows a difference is new.
        """
        if "messages" in self.body:
            first, *rest = self.body["messages"]
            first = first | {"content": f"{salt}\n{first['content']}"}
            return replace(self, body=self.body | {"messages": [first, *rest]})
        return replace(self, body=self.body | {"prompt": f"{salt}\n{self.body['prompt']}"})

    def filled(self, vocabulary: Sequence[int], seed: str) -> Prompt:
        """With random tokens in place of a text. Two of the same seed are the same prompt."""
        assert self.random_tokens
        drawn = random.Random(seed).choices(vocabulary, k=self.random_tokens)
        return replace(self, body=self.body | {"prompt": drawn})


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """The prompts of a dataset artifact's rows in an order that the seed decides."""
    with path.open(encoding="utf-8") as file:
        prompts = [_prompt(json.loads(line)) for line in file]
    found = [prompt for prompt in prompts if prompt]
    random.Random(seed).shuffle(found)
    return found


def synthetic_prompts(bench: Bench, seed: int) -> list[Prompt]:
    """`bench.requests` prompts of the lengths of `bench.lengths`, in their shares."""
    total = sum(kind.share for kind in bench.lengths)
    exact = [bench.requests * kind.share / total for kind in bench.lengths]
    counts = [int(wanted) for wanted in exact]
    # The largest remainders get what rounding down left.
    by_rest = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_rest[: bench.requests - sum(counts)]:
        counts[at] += 1
    found = [
        Prompt("completions", {}, kind.output_tokens, kind.input_tokens)
        for kind, count in zip(bench.lengths, counts, strict=True)
        for _ in range(count)
    ]
    random.Random(seed).shuffle(found)
    return found


def read_log(path: Path) -> list[Prompt]:
    """The answered requests of the gateway's log in their order, each as long as it was.

    Raises DataError when there is none.
    """
    parquet = require("pyarrow.parquet", "infer")
    found = []
    try:
        for file in log_files(path):
            rows = parquet.read_table(file, columns=_LOG_COLUMNS).to_pylist()
            found += [prompt for row in rows if (prompt := _logged(row))]
    except (OSError, ValueError) as error:
        raise DataError(f"bench.log: {path} is no log of the gateway: {error}") from error
    if not found:
        raise DataError(f"bench.log: {path} has no answered request for text")
    return found


def unique_prompts(
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
    phase: str,
    *,
    vocabulary: Sequence[int] = (),
    reuse: bool = False,
) -> Iterator[Prompt]:
    """`count` prompts; no two phases share one, two runs with the same seed share all.

    With `reuse` they repeat as they are, in every phase.
    """
    for index in range(count):
        place = index % len(prompts)
        prompt = prompts[place]
        name = f"{seed}/{place}" if reuse else f"{seed}/{phase}/{index}"
        if prompt.random_tokens:
            yield prompt.filled(vocabulary, name)
        elif reuse:
            yield prompt
        else:
            yield prompt.salted(hashlib.sha256(name.encode()).hexdigest()[:8])


def _prompt(row: dict[str, Any]) -> Prompt | None:
    """The conversation up to its last answer, or the beginning of a text; None when empty."""
    if "text" in row:
        text = row["text"][:_LONGEST_TEXT]
        return Prompt("completions", {"prompt": text}) if text else None
    messages = row["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return Prompt("chat/completions", {"messages": messages}) if messages else None


def _logged(row: dict[str, Any]) -> Prompt | None:
    """A logged request as it can be asked again: its own body where the log kept the whole of it,
    else random tokens; None for what was no answered text."""
    endpoint = next((name for name in _ENDPOINTS if row["path"].endswith(f"/v1/{name}")), None)
    if endpoint is None or row["status"] != 200 or not row["output_tokens"]:
        return None
    body = _body(row["request_body"])
    kept: dict[str, Any] = {name: body[name] for name in ("messages", "prompt") if name in body}
    if _is_text(kept):
        return Prompt(endpoint, kept, row["output_tokens"])
    if not row["prompt_tokens"]:
        return None
    return Prompt("completions", {}, row["output_tokens"], row["prompt_tokens"])


def _body(text: str | None) -> dict[str, Any]:
    """A kept body; empty when it was not kept, or was cut."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(kept: dict[str, Any]) -> bool:
    """Whether a salt can be put in front of it."""
    if messages := kept.get("messages"):
        return isinstance(messages[0].get("content"), str)
    return isinstance(kept.get("prompt"), str)
