"""The tokenizer and chat template that a training speaks, and the rows in their tokens."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.chat import ChatTemplate
from tunesmith.config.errors import DataError, ModelError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.data import Data
from tunesmith.data import read_rows
from tunesmith.ledger import Artifact
from tunesmith.train.cache import cached
from tunesmith.train.examples import (
    Examples,
    tokenise_conversations,
    tokenise_pairs,
    tokenise_texts,
)
from tunesmith.train.tokenizer import learn_tokenizer
from tunesmith.train.tokens import TokenWriter

TRAIN_FILE, EVALUATION_FILE = "train.jsonl", "evaluation.jsonl"


@dataclass(frozen=True)
class Language:
    """How text becomes tokens."""

    tokenizer: Any
    template: ChatTemplate | None
    """None for a base without one, which can still learn text."""

    @property
    def end_of_turn_id(self) -> int | None:
        """The token at which engines stop."""
        if self.template:
            return self.template.end_of_turn_id
        return None if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @property
    def template_sha256(self) -> str | None:
        """Hash of all that decides how a conversation is rendered."""
        return self.template.sha256 if self.template else None

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the template in use."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of all that decides how text is divided into tokens."""
        text = self.tokenizer.backend_tokenizer.to_str()
        # Before them stand truncation and padding, which every call sets anew.
        parts = "".join(text.partition('"added_tokens"')[1:]) or text
        kind = type(self.tokenizer)
        code = "" if kind.__module__.startswith("transformers.") else inspect.getsource(kind)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        identity = [parts, kind.__qualname__, code, special]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def tokenise(
        self,
        dataset: Artifact,
        file: str,
        data: Data,
        limit: int | None = None,
        *,
        texts_apart: bool = False,
    ) -> Examples:
        """The rows of one file of a dataset as examples (the first `limit` of them), tokenised
        now or found in the store's cache.

        Raises DataError when too many rows cannot be learnt, or none can.
        """
        count = dataset.manifest.metrics[file.replace(".jsonl", "_rows")]
        total = min(count, limit or count)

        def make(writer: TokenWriter) -> Examples:
            rows = islice(read_rows(dataset.root / file), limit)
            if data.format == "text":
                return tokenise_texts(rows, self.tokenizer, data, total, writer, apart=texts_apart)
            assert self.template, "conversations are only read with a template"
            tokenise = tokenise_pairs if data.format == "preference" else tokenise_conversations
            return tokenise(rows, self.template, data, total, writer)

        identity = {
            "rows": dataset.manifest.files[file].sha256,
            "template": self.template_sha256,
            "tokenizer": self.tokenizer_sha256,
            "data": data.model_dump(include={"max_length", "truncation"}),
            "pairs": data.format == "preference",
            "texts_apart": texts_apart,
            "limit": limit,
        }
        found = cached(dataset.folder.parent.parent / "cache", identity, make)
        found.check(data)
        return found


def read_language(base: Path, recipe: Recipe) -> Language:
    """The language of a base: its own, with the recipe's chat template if it names one.

    Raises ModelError when conversations are to be learnt and there is no chat template.
    """
    from transformers import AutoTokenizer

    assert recipe.data
    trust = recipe.model.trust_remote_code
    if recipe.data.format == "text" and not recipe.model.chat_template:
        try:
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"{base}: no tokenizer can be loaded from it: {error}") from error
        return Language(tokenizer, ChatTemplate(tokenizer) if tokenizer.chat_template else None)
    template = ChatTemplate.load(base, override=recipe.model.chat_template, trust_remote_code=trust)
    return Language(template.tokenizer, template)


def learn_language(dataset: Artifact, recipe: Recipe) -> Language:
    """A new tokenizer from the training texts. Raises DataError when the rows are no texts."""
    assert recipe.data and recipe.train and recipe.train.architecture
    if recipe.data.format != "text":
        raise DataError(
            f"train.method: pretrain learns from text; data.format is {recipe.data.format}"
        )
    shape = recipe.train.architecture
    tokenizer = learn_tokenizer(
        (row["text"] for row in read_rows(dataset.root / TRAIN_FILE)),
        shape.vocab_size,
        shape.max_position_embeddings,
    )
    if recipe.model.chat_template:
        tokenizer.chat_template = recipe.model.chat_template.read_text(encoding="utf-8")
    return Language(tokenizer, ChatTemplate(tokenizer))
