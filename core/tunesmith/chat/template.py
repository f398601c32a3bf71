"""Rendering a conversation, and the proof of which of its tokens the model has to learn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from tunesmith.chat.content import Message, as_served, content_text
from tunesmith.chat.jinja import JinjaTemplate
from tunesmith.chat.spans import Ending, Span, find_ending, holds, narrow, touches, turn_span
from tunesmith.config.errors import DataError, ModelError, require

Tools = Sequence[Mapping[str, Any]]
_QUESTION = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "tunesmithprobe"}
_REASONED_ANSWER = {**_ANSWER, "reasoning": "thought"}
_END_OF_REASONING = "</think>"


@dataclass(frozen=True)
class Supervised:
    """A tokenised conversation."""

    input_ids: list[int]

    mask: list[bool]
    """True where the token is learnt: the assistant's text and its end-of-turn token."""


class HistoryDiffers(DataError):
    """The template writes an assistant turn differently once other turns follow it."""


class ChatTemplate:
    """A tokenizer with its chat template, as the engine's chat endpoint applies them."""

    def __init__(self, tokenizer: Any, source: str = "the base") -> None:
        """Raises ModelError when there is no template, or one that cannot be compiled."""
        self.tokenizer = tokenizer
        self._source = source
        self._is_proven = False
        if not tokenizer.is_fast:
            raise ModelError(
                f"{source}: its tokenizer ({type(tokenizer).__name__}) cannot say which characters "
                "a token stands for; use a base that has a tokenizer.json"
            )
        try:
            self._plain = JinjaTemplate.of(tokenizer.get_chat_template())
            # Some tokenizers have a second template for conversations with tools.
            self._with_tools = JinjaTemplate.of(tokenizer.get_chat_template(tools=[{}]))
        except ValueError as error:
            raise ModelError(
                f"{source} has no chat template, so it is not known how a conversation looks to "
                "it; give a Jinja file with model.chat_template, or use the instruct model"
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{source}: line {error.lineno} of the chat template: {error}"
            ) from error

    @classmethod
    def load(
        cls, folder: Path, override: Path | None = None, *, trust_remote_code: bool = False
    ) -> ChatTemplate:
        """From a model's folder, with the template of `override` in place of its own.

        Raises ModelError when there is no tokenizer or no template.
        """
        transformers = require("transformers", "train")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"{folder}: no tokenizer can be loaded from it ({reason})") from error
        if override:
            try:
                tokenizer.chat_template = override.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"model.chat_template: cannot read {override}: {error}") from error
        return cls(tokenizer, str(override or folder))

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the template in use."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def sha256(self) -> str:
        """Hash of all that decides a rendering: the template and the special tokens it names."""
        templates = (self._plain, self._with_tools)
        names = templates[0].names | templates[1].names
        tokens = {name: token for name, token in self._special_tokens.items() if name in names}
        identity = [sorted({template.text for template in templates}), tokens]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant turn; engines must stop at it."""
        return int(self.tokenizer.convert_tokens_to_ids(self._ending.token))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises DataError when the template rejects it."""
        return self._render(messages, tools, add_generation_prompt)[0]

    def prompt_ids(self, messages: Sequence[Message], *, tools: Tools | None = None) -> list[int]:
        """Exactly the tokens that the engine's chat endpoint makes of these messages."""
        text = self.render(messages, tools=tools, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def supervise(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        turns: Sequence[int] | None = None,
    ) -> Supervised:
        """Tokenise a conversation and mark what is learnt: its learnt turns (or those at
        `turns`), from where the serving prompt ends to the end-of-turn token.

        `{% generation %}` marks of the template narrow it further. Nothing is guessed: every
        prompt must be a prefix of the text and of the token ids. Raises ModelError when not even
        a plain conversation allows that, and DataError when this one does not.
        """
        self._prove()
        return self._supervise(messages, tools, turns)

    def _supervise(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        turns: Sequence[int] | None = None,
    ) -> Supervised:
        learnt = self.learnt_turns(messages) if turns is None else turns
        if not learnt:
            raise DataError("no assistant turn, so nothing to learn")
        whole, marks = self._render(messages, tools)
        prompts = [
            self.render(messages[:turn], tools=tools, add_generation_prompt=True) for turn in learnt
        ]
        encoded = self.tokenizer(
            [whole, *prompts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, offsets = list(encoded["input_ids"][0]), encoded["offset_mapping"][0]
        mask = [False] * len(ids)
        for turn, prompt, prompt_ids in zip(learnt, prompts, encoded["input_ids"][1:], strict=True):
            try:
                span = self._turn_span(messages, turn, whole, prompt, tools)
                spans = _marked(messages[turn], whole, span, marks)
                if ids[: len(prompt_ids)] != list(prompt_ids):
                    raise _merged(messages[turn], prompt)
            except DataError as error:
                raise type(error)(f"turn {turn + 1}: {error}") from error
            first = len(prompt_ids)
            last = next(at for at in range(first, len(ids)) if offsets[at][1] >= span[1])
            if ids[first : last + 1].count(self.end_of_turn_id) != 1:
                raise DataError(
                    f"turn {turn + 1}: the assistant's text contains {self._ending.token!r}, the "
                    "token that ends a turn; remove it from the text"
                )
            for at in range(first, last):
                mask[at] = spans is None or touches(offsets[at], spans)
            mask[last] = True
        return Supervised(ids, mask)

    def examples(
        self, messages: Sequence[Message], *, tools: Tools | None = None
    ) -> list[Supervised]:
        """The conversation as training examples: one, or one per learnt turn where the template
        rewrites turns once they are history (as thinking models' templates do)."""
        try:
            return [self.supervise(messages, tools=tools)]
        except HistoryDiffers:
            return [
                self.supervise(messages[: turn + 1], tools=tools, turns=[turn])
                for turn in self.learnt_turns(messages)
            ]

    def _turn_span(
        self, messages: Sequence[Message], turn: int, whole: str, prompt: str, tools: Tools | None
    ) -> Span:
        """The characters of one turn that serving would have the model write, proven."""
        is_last = turn == len(messages) - 1
        through = whole if is_last else self.render(messages[: turn + 1], tools=tools)
        span = turn_span(whole, prompt, through, self._ending)
        if span is None and is_last:
            raise DataError(
                "the chat template writes an answer that does not go on from the prompt that "
                f"serving sends (which ends with {prompt[-30:]!r}), so training would not be what "
                "is served; give another template with model.chat_template"
            )
        if span is None:
            raise HistoryDiffers(
                "the chat template writes it differently once other turns follow; let each "
                "conversation end with the turn to learn, or give another template with "
                "model.chat_template"
            )
        if not holds(whole[slice(*span)], content_text(messages[turn])):
            raise DataError("the chat template leaves out part of the assistant's text")
        return span

    def _render(
        self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The text, and the characters inside `{% generation %}` marks (None: it has no marks)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise DataError("a conversation without messages")
        template = self._with_tools if tools else self._plain
        marked = template.marked and not add_generation_prompt
        try:
            texts, spans = render_jinja_template(
                conversations=[as_served(messages, as_parts=template.as_parts)],
                tools=list(tools) if tools else None,
                chat_template=template.text,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"the chat template rejects this conversation: {error}") from error
        return str(texts[0]), [tuple(span) for span in spans[0]] if marked else None

    @staticmethod
    def learnt_turns(messages: Sequence[Message]) -> list[int]:
        """Indices of the assistant's messages, those with `"weight": 0` left out."""
        return [
            at
            for at, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]

    def _prove(self) -> None:
        """Raises ModelError when neither a plain answer nor one with reasoning can be learnt."""
        if self._is_proven:
            return
        faults = []
        for answer in (_ANSWER, _REASONED_ANSWER):
            try:
                self._supervise([_QUESTION, answer])
                self._is_proven = True
                return
            except DataError as error:
                faults.append(error)
        raise ModelError(f"{self._source}: {faults[0]}") from faults[0]

    @cached_property
    def _ending(self) -> Ending:
        try:
            text = self.render([_QUESTION, _ANSWER])
        except DataError as error:
            raise ModelError(f"{self._source}: {error}") from error
        _, found, after = text.rpartition(_ANSWER["content"])
        if not found:
            raise ModelError(f"{self._source}: the chat template leaves out the assistant's text")
        tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        ending = find_ending(after, [*tokens, str(self.tokenizer.eos_token or "")])
        if ending is None:
            raise ModelError(
                f"{self._source}: the chat template ends an assistant turn with {after!r}, in "
                "which there is no special token of the tokenizer, so the model could never learn "
                "to stop; give a template that ends it with one, with model.chat_template"
            )
        return ending

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        return {name: str(token) for name, token in tokens.items()}


def _merged(message: Message, prompt: str) -> DataError:
    """The fault when the prompt has other tokens alone than before its answer."""
    answer = content_text(message)
    if answer[:1].isspace():
        return DataError(
            f"the beginning of the answer {answer[:20]!r} merges with the end of the prompt "
            f"{prompt[-20:]!r} into other tokens than serving sends; remove white space from the "
            "beginning of the answer"
        )
    return DataError(
        f"the tokenizer splits the end of the prompt {prompt[-20:]!r} differently once the answer "
        f"{answer[:20]!r} follows, so training would not see what serving sends; give a template "
        "whose prompt ends with a special token or one line break, with model.chat_template"
    )


def _marked(
    message: Message, whole: str, span: Span, marks: Sequence[Span] | None
) -> list[Span] | None:
    """The part of a turn inside the template's marks; None when it has none."""
    if marks is None:
        return None
    spans = narrow(span, marks)
    answer = content_text(message).rpartition(_END_OF_REASONING)[2]
    if not spans or not holds("".join(whole[slice(*part)] for part in spans), answer):
        raise DataError(
            "the {% generation %} marks of the chat template leave out part of the assistant's "
            "text; put them around all of it"
        )
    return spans
