"""How many tokens a request may use, counted before it starts as the engine will count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError, ModelError
from tunesmith.serve.govern.usage import Ask

_UNCOUNTED_EXTRA_TOKENS = 256
"""Room for what a template adds, where only the bytes of a request can be counted."""


class Measure:
    """The tokenizer and template of the served model."""

    def __init__(self, template: ChatTemplate | None) -> None:
        self._template = template

    @classmethod
    def load(cls, model: Path, chat_template: Path | None, *, trust_remote_code: bool) -> Measure:
        """A model without a usable chat template is counted by bytes."""
        try:
            template = ChatTemplate.load(model, chat_template, trust_remote_code=trust_remote_code)
        except ModelError:
            template = None
        return cls(template)

    def prompt_tokens(self, ask: Ask) -> int:
        """Tokens of the prompt; an upper bound where they cannot be counted.

        Byte-level tokenizers make at most one token of a byte.
        """
        try:
            return self._count(ask.fields)
        except (DataError, KeyError, TypeError, ValueError):
            return len(ask.body) + _UNCOUNTED_EXTRA_TOKENS

    def _count(self, fields: dict[str, Any]) -> int:
        if self._template is None:
            raise ValueError("no template")
        if "messages" in fields:
            tools = fields.get("tools")
            return len(self._template.prompt_ids(fields["messages"], tools=tools))
        prompt = fields["prompt"] if "prompt" in fields else fields["input"]
        return sum(self._tokens_of(one) for one in _prompts(prompt))

    def _tokens_of(self, prompt: str | list[int]) -> int:
        if not isinstance(prompt, str):
            return len(prompt)
        assert self._template
        return len(self._template.tokenizer(prompt, verbose=False)["input_ids"])


def most_output_tokens(ask: Ask, prompt_tokens: int, max_model_len: int) -> int:
    """The most output tokens that the engine can make for a request."""
    room = max(0, max_model_len - prompt_tokens)
    most = ask.most_output_tokens
    return ask.choices * (room if most is None else min(most, room))


def _prompts(prompt: Any) -> list[Any]:
    """A completion's prompt is a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise TypeError("neither a text nor a list")
    return [prompt] if prompt and isinstance(prompt[0], int) else prompt
