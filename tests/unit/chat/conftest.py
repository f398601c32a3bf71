"""Small tokenizers that carry the templates of well-known model families."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.chat import ChatTemplate

FAMILIES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "families.yaml").read_text(encoding="utf-8")
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog.\nuser\nassistant\nsystem\n\n",
    "Hello! How can I help you today? Sure, here is the answer: forty two.\n",
    "def double(number):\n    return number * 2\n",
] * 3


# Words, numbers, marks, line breaks and spaces, as current models divide text.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def make_tokenizer(
    tokens: tuple[str, ...], bos: str | None, eos: str | None, words: str | None
) -> Any:
    """A byte-level BPE tokenizer with these special tokens; `words` None is GPT-2's division."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )


@functools.cache
def template_chat_of(name: str) -> ChatTemplate:
    """The chat template of a family, on a tokenizer whose padding token is the end token."""
    family = FAMILIES[name]
    return _template_chat(
        family["template"], tuple(family["tokens"]), family.get("bos"), family["eos"]
    )


@pytest.fixture(scope="session")
def families() -> dict[str, dict[str, Any]]:
    return FAMILIES


@pytest.fixture(scope="session")
def family_chat() -> Callable[[str], ChatTemplate]:
    """The chat template of a family by its name."""
    return template_chat_of


@pytest.fixture(scope="session")
def template_chat() -> Callable[..., ChatTemplate]:
    """Any template, on a tokenizer with the given special tokens."""
    return _template_chat


def _template_chat(
    template: str | None,
    tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    words: str | None = _WORDS,
) -> ChatTemplate:
    tokenizer = copy.deepcopy(make_tokenizer(tokens, bos, eos, words))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, "tests/base")
