"""`tunesmith data`: what is in the data set, and what a model would learn of it, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType

from tunesmith.chat import Supervised
from tunesmith.chat.length import kept_part
from tunesmith.config.errors import DataError, UserError
from tunesmith.config.schema.data import Data
from tunesmith.data import command as counts
from tunesmith.data import make_dataset
from tunesmith.ledger import Artifact
from tunesmith.pipeline.rows import sample_rows
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log
from tunesmith.train.examples import Examples, supervise_pair
from tunesmith.train.language import (
    EVALUATION_FILE,
    TRAIN_FILE,
    Language,
    learn_language,
    read_language,
)
from tunesmith.train.plan import config_folder
from tunesmith.train.spans_view import show_lengths, show_row, show_tokens

_BINS = 12


def run(stages: Stages, rows: int = 0) -> dict[str, Any]:
    """Make the dataset unless it is there; with `rows`, tokenise it, and take so many of its
    training rows apart. Where the base cannot be had, only the counts."""
    result = counts.run(stages)
    data = stages.recipe.data
    if not rows or not data:
        return result
    dataset = make_dataset(stages)
    try:
        language = _language(stages, dataset)
    except (UserError, OSError, ImportError) as error:
        log(f"without the base there is nothing to say about tokens: {error}")
        return result | {"tokens": None, "no_tokens_because": str(error), "shown": []}
    files = {"train": TRAIN_FILE, "evaluation": EVALUATION_FILE}
    examples = {side: language.tokenise(dataset, file, data) for side, file in files.items()}
    return result | {
        "tokens": {side: figures(found) for side, found in examples.items()},
        "shown": list(_shown(language, dataset, data, rows, stages.recipe.seed)),
    }


def show(result: dict[str, Any]) -> RenderableType:
    """Counts, lengths, and the rows with what is learnt of them."""
    parts = [counts.show(result)]
    if tokens := result.get("tokens"):
        parts += [show_tokens(tokens), show_lengths(tokens["train"])]
        parts += [show_row(row) for row in result["shown"]]
    return Group(*parts)


def figures(examples: Examples) -> dict[str, Any]:
    """Sizes of one side's sequences, and what was lost on the way to them."""
    lengths, supervised = examples.lengths(), int(examples.supervised().sum())
    quantiles = {"p50": 50, "p95": 95, "p99": 99}
    return {
        "rows": examples.read,
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": supervised,
        "supervised_share": supervised / int(lengths.sum()),
        "truncated": examples.truncated,
        "dropped": {
            "too long": examples.too_long,
            "nothing to learn": examples.dropped - examples.too_long,
            "refused by the chat template": len(examples.faults),
        },
        "lengths": {
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 1),
            **{name: int(np.percentile(lengths, at)) for name, at in quantiles.items()},
            "max": int(lengths.max()),
        },
        "histogram": _histogram(lengths),
    }


def _histogram(lengths: NDArray[np.int64]) -> list[dict[str, int]]:
    """Sequences by length, in bins of equal width."""
    width = -(-int(lengths.max()) // _BINS)
    found = np.bincount((lengths - 1) // width)
    return [
        {"from": at * width + 1, "to": (at + 1) * width, "sequences": int(count)}
        for at, count in enumerate(found)
    ]


def _language(stages: Stages, dataset: Artifact) -> Language:
    """What the training would speak, without the base's weights. Raises UserError or OSError."""
    recipe = stages.recipe
    if recipe.train and recipe.train.method == "pretrain":
        return learn_language(dataset, recipe)
    if folder := config_folder(stages):
        return read_language(folder, recipe)
    if recipe.model.chat_template:
        raise UserError("with model.chat_template it has to be made first: tunesmith train")
    maker = stages.builtin_base
    return learn_language(make_dataset(maker), maker.recipe)


def _shown(
    language: Language, dataset: Artifact, data: Data, rows: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Some training rows, each as its sequences, each of them as spans of tokens that are alike."""
    for row in sample_rows(dataset.root / TRAIN_FILE, rows, seed):
        try:
            sequences = [
                {"name": name, **_sequence(language, data, one)}
                for name, one in _supervised(language, row)
            ]
        except DataError as error:
            yield {"id": row["id"], "refused": str(error), "sequences": []}
        else:
            yield {"id": row["id"], "refused": None, "sequences": sequences}


def _supervised(language: Language, row: dict[str, Any]) -> list[tuple[str, Supervised]]:
    """What a row becomes before it is cut."""
    if "text" in row:
        ids = [*language.tokenizer(row["text"], verbose=False)["input_ids"]]
        ids.append(language.tokenizer.eos_token_id)
        return [("text", Supervised(ids, [True] * len(ids)))]
    assert language.template
    if "rejected" in row:
        return list(
            zip(("chosen", "rejected"), supervise_pair(language.template, row), strict=True)
        )
    found = language.template.examples(row["messages"], tools=row.get("tools"))
    if len(found) == 1:
        return [("", found[0])]
    return [(f"turn {at} of {len(found)}", one) for at, one in enumerate(found, 1)]


def _sequence(language: Language, data: Data, one: Supervised) -> dict[str, Any]:
    learnt = np.array(one.mask)
    learnt[:1] = False
    # Texts are packed: what is past the limit goes on in the next sequence.
    limit = len(learnt) if data.format == "text" else data.max_length
    kept = kept_part(learnt, limit, data.truncation)
    states = np.where(learnt, "learnt", "context")
    if learnt.nonzero()[0].max(initial=0) >= limit:
        states[: kept.start] = states[kept.stop :] = "cut"
    special = {
        token for token, added in language.tokenizer.added_tokens_decoder.items() if added.special
    }
    spans = []
    kinds = [
        (str(state), token in special) for state, token in zip(states, one.input_ids, strict=True)
    ]
    for (state, is_special), group in groupby(enumerate(one.input_ids), lambda at: kinds[at[0]]):
        text = language.tokenizer.decode([token for _, token in group])
        spans.append({"text": text, "state": state, "special": is_special})
    counted = Counter(states.tolist())
    return {
        "tokens": len(states),
        "learnt_tokens": counted["learnt"],
        "cut_tokens": counted["cut"],
        "spans": spans,
    }
