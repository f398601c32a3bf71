"""The figures of a fidelity: paired row by row, with bootstrap intervals. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.evaluate.fidelity.ask import Distributions
from tunesmith.evaluate.fidelity.divergence import divergence_T, flipped_T
from tunesmith.evaluate.heldout import Item
from tunesmith.evaluate.measure import text_score
from tunesmith.statistics import Interval, Rows, paired_relative_difference, ratio_of_sums

_MIN_SLICE_ROWS = 4
_QUARTILES = ("shortest", "short", "long", "longest")

Answers = Mapping[str, Mapping[str, str]]


def row_of(
    item: Item,
    source: str | None,
    parent: Sequence[Distributions],
    child: Sequence[Distributions],
    answers: tuple[Answers, Answers],
    texts: Sequence[str],
) -> dict[str, Any]:
    """One held-out row as it is kept: sums over its learnt tokens, and both greedy answers."""
    pairs = list(zip(parent, child, strict=True))
    of_parent, of_child = ({**side[item.id], "reference": item.reference} for side in answers)
    row: dict[str, Any] = {
        "id": item.id,
        "source": source,
        "completion_tokens": sum(len(one.learnt) for one in item.scored),
        "completion_loss_sum_nats": _loss(item, child),
        "parent_loss_sum_nats": _loss(item, parent),
        "kl_sum_nats": float(sum(divergence_T(p, c).sum() for p, c in pairs)),
        "flipped_tokens": int(sum(flipped_T(p, c).sum() for p, c in pairs)),
        "answer": of_child["answer"],
        "finish_reason": of_child["finish_reason"],
        "parent_answer": of_parent["answer"],
        "reference": item.reference,
    }
    for task in texts:
        row |= {task: text_score(task, of_child), f"parent_{task}": text_score(task, of_parent)}
    return row


def summarize(rows: Rows, texts: Sequence[str], confidence: float, seed: int) -> dict[str, Any]:
    """In total, and per slice: by source where rows have several, and by quartile of length."""
    slices = {
        name: {
            label: {"rows": len(part), **_figures(part, texts, confidence, seed)}
            for label, part in parts.items()
            if len(part) >= _MIN_SLICE_ROWS
        }
        for name, parts in (("source", _by_source(rows)), ("length", _by_length(rows)))
    }
    return {"total": _figures(rows, texts, confidence, seed), "slices": slices}


def mean_loss(sequences: Sequence[Distributions], confidence: float, seed: int) -> Interval:
    """Nats per token over whole sequences."""
    sums = [float(one.losses_S.sum()) for one in sequences]
    counts = [float(len(one.losses_S)) for one in sequences]
    return ratio_of_sums(sums, counts, confidence=confidence, seed=seed)


def rate_change(
    tokens: int, child_s: Sequence[float], parent_s: Sequence[float], confidence: float, seed: int
) -> dict[str, Any]:
    """Tokens per second of both over the same rounds, and how far the child's is from the
    parent's."""
    work = [float(tokens)] * len(child_s)

    def rate(seconds: Sequence[float]) -> dict[str, float]:
        return ratio_of_sums(work, seconds, confidence=confidence, seed=seed)._asdict()

    change = paired_relative_difference(
        work, child_s, work, parent_s, confidence=confidence, seed=seed
    )
    return {
        "tokens_per_s": rate(child_s),
        "parent_tokens_per_s": rate(parent_s),
        "change": change._asdict(),
    }


def golden(answers: tuple[Answers, Answers], names: Sequence[str]) -> dict[str, int]:
    """Of a few prompts, how many the parent and the checkpoint answer: with some text, and an end
    that is the model's own or the limit's."""

    def answered(side: Answers) -> int:
        return sum(
            bool(side[name]["answer"].strip()) and side[name]["finish_reason"] in ("stop", "length")
            for name in names
        )

    by_parent, by_child = answers
    return {"asked": len(names), "answered": answered(by_child), "by_parent": answered(by_parent)}


def _loss(item: Item, found: Sequence[Distributions]) -> float:
    pairs = zip(item.scored, found, strict=True)
    return float(sum(one.losses_S[at - 1] for scored, one in pairs for at in scored.learnt))


def _figures(rows: Rows, texts: Sequence[str], confidence: float, seed: int) -> dict[str, Any]:
    tokens = [float(row["completion_tokens"]) for row in rows]

    def per_token(key: str) -> dict[str, float]:
        sums = [float(row[key]) for row in rows]
        return ratio_of_sums(sums, tokens, confidence=confidence, seed=seed)._asdict()

    found: dict[str, Any] = {
        "loss": per_token("completion_loss_sum_nats"),
        "parent_loss": per_token("parent_loss_sum_nats"),
        "loss_increase": paired_relative_difference(
            [row["completion_loss_sum_nats"] for row in rows],
            tokens,
            [row["parent_loss_sum_nats"] for row in rows],
            tokens,
            confidence=confidence,
            seed=seed,
        )._asdict(),
        "kl": per_token("kl_sum_nats"),
        "flipped": per_token("flipped_tokens"),
        "flipped_answers": _mean(
            [float(row["answer"] != row["parent_answer"]) for row in rows], confidence, seed
        ),
    }
    for task in texts:
        changes = [
            row[task] - row[f"parent_{task}"]
            for row in rows
            if row[task] is not None and row[f"parent_{task}"] is not None
        ]
        found[f"{task}_change"] = _mean(changes, confidence, seed) if changes else None
    return found


def _mean(values: Sequence[float], confidence: float, seed: int) -> dict[str, float]:
    ones = [1.0] * len(values)
    return ratio_of_sums(values, ones, confidence=confidence, seed=seed)._asdict()


def _by_source(rows: Rows) -> dict[str, Rows]:
    names = sorted({row["source"] for row in rows if row["source"]})
    if len(names) < 2:
        return {}
    return {name: [row for row in rows if row["source"] == name] for name in names}


def _by_length(rows: Rows) -> dict[str, Rows]:
    ranked = sorted(rows, key=lambda row: int(row["completion_tokens"]))
    bounds = [len(ranked) * part // 4 for part in range(5)]
    return {name: ranked[bounds[at] : bounds[at + 1]] for at, name in enumerate(_QUARTILES)}
