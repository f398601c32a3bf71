"""The tokenizer and chat template that a training speaks, and the rows in their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.chat import ChatTemplate
from tunesmith.config.errors import DataError, ModelError
from tunesmith.config.schema import Data, Recipe
from tunesmith.data import read_rows
from tunesmith.ledger import Artifact
from tunesmith.train.examples import (
    Examples,
    tokenise_conversations,
    tokenise_pairs,
    tokenise_texts,
)
from tunesmith.train.tokenizer import learn_tokenizer

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

    def tokenise(
        self, dataset: Artifact, file: str, data: Data, limit: int | None = None
    ) -> Examples:
        """The rows of one file of a dataset as examples (the first `limit` of them).

        Raises DataError when too many rows cannot be learnt, or none can.
        """
        rows = islice(read_rows(dataset.root / file), limit)
        count = dataset.manifest.metrics[file.replace(".jsonl", "_rows")]
        total = min(count, limit or count)
        if data.format == "text":
            return tokenise_texts(rows, self.tokenizer, data.max_length, total)
        assert self.template, "conversations are only read with a template"
        tokenise = tokenise_pairs if data.format == "preference" else tokenise_conversations
        return tokenise(rows, self.template, data.max_length, data.max_error_rate, total)


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
