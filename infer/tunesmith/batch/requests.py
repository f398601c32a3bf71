"""From what a row asks for to what the engine is given: tokens and parameters."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.batch.errors import Invalid, RowError
from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError
from tunesmith.engine import EngineSpec, Kind, Request


@dataclass(frozen=True)
class Ask:
    """What a row wants from a model, in words; it has `messages` or `prompts`."""

    messages: Sequence[Mapping[str, Any]] | None = None
    """A conversation, which the chat template makes a prompt of."""

    tools: Sequence[Mapping[str, Any]] | None = None
    prompts: Sequence[str | Sequence[int]] = ()
    """What goes to the model as it is: texts, or token ids."""

    kind: Kind = "generate"
    completions: Sequence[str] = ()
    """To be scored, each after the prompt."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None


class RequestMaker:
    """Makes requests; pure, so that any number of processes can each have one."""

    def __init__(self, spec: EngineSpec, template: ChatTemplate, max_model_len: int) -> None:
        self._spec, self._template, self._max_model_len = spec, template, max_model_len

    @classmethod
    def open(cls, spec: EngineSpec, max_model_len: int) -> RequestMaker:
        """With the tokenizer and the template of the spec's model."""
        template = ChatTemplate.load(
            spec.model, spec.chat_template, trust_remote_code=spec.trust_remote_code
        )
        return cls(spec, template, max_model_len)

    def request(self, index: int, ask: Ask) -> Request | RowError:
        """The request of the row at `index`, or why the model cannot take it."""
        try:
            return self._request(index, ask)
        except Invalid as invalid:
            return invalid.error

    def _request(self, index: int, ask: Ask) -> Request:
        if ask.adapter is not None and ask.adapter not in self._spec.adapters:
            known = ", ".join(self._spec.adapters) or "none"
            raise Invalid(
                "unknown_adapter",
                f"no adapter {ask.adapter!r}; batch.adapters has {known}",
            )
        sampling = dict(ask.sampling)
        text, prompts = self._prompts(ask)
        parts = [self._after(text, prompts[0], words) for words in ask.completions]
        if not parts and (len(prompts) > 1 or ask.kind == "embed"):
            prompts, parts = [[]], prompts
        if ask.messages is not None and ask.kind == "generate":
            ends = [*sampling.get("stop_token_ids", ()), self._template.end_of_turn_id]
            sampling["stop_token_ids"] = ends
        compact = [array("i", ids) for ids in parts]
        request = Request(index, array("i", prompts[0]), ask.kind, sampling, compact, ask.adapter)
        # A score and an embedding read all their tokens; an answer wants room for one more.
        room = self._max_model_len - request.longest
        if room < (0 if ask.kind == "embed" else 1):
            raise Invalid(
                "prompt_too_long",
                f"{request.longest} tokens; the model takes {self._max_model_len} with the answer",
            )
        if ask.kind == "generate":
            asked = sampling.get("max_tokens")
            sampling["max_tokens"] = min(math.inf if asked is None else asked, room)
            if sampling.get("temperature", 1.0) == 0:
                sampling.pop("seed", None)
            elif sampling.get("seed") is None:
                sampling["seed"] = self._spec.seed + index
        return request

    def _prompts(self, ask: Ask) -> tuple[str, list[list[int]]]:
        """Token ids of each prompt, and the text of the first one where it is known."""
        tokenizer = self._template.tokenizer
        if ask.messages is None:
            found = [
                list(tokenizer(one, verbose=False)["input_ids"])
                if isinstance(one, str)
                else list(one)
                for one in ask.prompts
            ]
            if not all(found):
                raise Invalid("missing_prompt", "the prompt has no tokens")
            first = ask.prompts[0]
            return first if isinstance(first, str) else "", found
        try:
            text = self._template.render(
                ask.messages, tools=ask.tools, add_generation_prompt=ask.kind != "embed"
            )
        except (DataError, TypeError, ValueError) as error:
            raise Invalid("invalid_messages", str(error)) from error
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return text, [list(ids)]

    def _after(self, text: str, prompt_ids: Sequence[int], completion: str) -> list[int]:
        """Tokens of a completion, as they are after the prompt where that leaves the prompt's own
        tokens alone, else as they are by themselves."""
        tokenizer = self._template.tokenizer
        for special in (False, True) if text else ():
            whole = tokenizer(text + completion, add_special_tokens=special, verbose=False)
            ids = list(whole["input_ids"])
            if ids[: len(prompt_ids)] == list(prompt_ids) and len(ids) > len(prompt_ids):
                return ids[len(prompt_ids) :]
        ids = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise Invalid("missing_column", "the completion to score has no tokens")
        return ids
