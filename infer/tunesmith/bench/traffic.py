"""What is asked and when: unique prompts from the recipe's held-out rows, arrivals from its seed.

Both are fixed before the load starts, so that every variant gets the same work at the same
moments and a slow engine cannot slow its own load down.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_TEXT = 1000  # characters of a document that are given as the prompt to continue


@dataclass(frozen=True)
class Prompt:
    """One thing to ask, as an endpoint of the OpenAI API and the part of its body that asks it."""

    endpoint: str
    """`chat/completions` or `completions`."""

    body: dict[str, Any]

    def salted(self, salt: str) -> Prompt:
        """The same question with a first word that no other request has.

        Engines keep the work done for a beginning they have seen, so a prompt sent twice measures
        that memory. The salt comes first because only what follows a difference is new.
        """
        if "messages" in self.body:
            first, *rest = self.body["messages"]
            first = first | {"content": f"{salt}\n{first['content']}"}
            return Prompt(self.endpoint, self.body | {"messages": [first, *rest]})
        return Prompt(self.endpoint, self.body | {"prompt": f"{salt}\n{self.body['prompt']}"})


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """The prompts of a dataset artifact's rows in an order that the seed decides."""
    with path.open(encoding="utf-8") as file:
        prompts = [_prompt(json.loads(line)) for line in file]
    found = [prompt for prompt in prompts if prompt]
    random.Random(seed).shuffle(found)
    return found


def salted_prompts(
    prompts: Sequence[Prompt], count: int, seed: int, phase: str
) -> Iterator[Prompt]:
    """`count` unique prompts; no two phases share one, two runs with the same seed share all."""
    for index in range(count):
        salt = hashlib.sha256(f"{seed}/{phase}/{index}".encode()).hexdigest()[:8]
        yield prompts[index % len(prompts)].salted(salt)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests arrive, at `rate` per second on average.

    Gaps are exponential and left as they fall: scaled to fit the mean, they would lose the bursts
    that make a queue.
    """
    source = random.Random(f"{seed}/arrivals")
    arrivals, now_s = [], 0.0
    for _ in range(count):
        arrivals.append(now_s)
        now_s += source.expovariate(rate)
    return arrivals


def _prompt(row: dict[str, Any]) -> Prompt | None:
    """The conversation up to its last answer, or the beginning of a text; None when empty."""
    if "text" in row:
        text = row["text"][:_LONGEST_TEXT]
        return Prompt("completions", {"prompt": text}) if text else None
    messages = row["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return Prompt("chat/completions", {"messages": messages}) if messages else None
