"""Divergence from the likeliest tokens, and the paired figures over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunesmith.evaluate.fidelity import figures
from tunesmith.evaluate.fidelity.ask import Distributions, _read
from tunesmith.evaluate.fidelity.divergence import divergence_T, flipped_T
from tunesmith.evaluate.heldout import Item, Scored

VOCABULARY = 512


def log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def pair(noise: float, spread: float = 2.5) -> tuple[Any, Any]:
    """Log-probabilities of two models over a whole vocabulary, at 40 positions."""
    random = np.random.default_rng(0)
    logits = random.normal(0, spread, (40, VOCABULARY))
    return log_softmax(logits), log_softmax(logits + random.normal(0, noise, logits.shape))


def likeliest(logprobs: Any, count: int) -> Distributions:
    ids = np.argsort(-logprobs, axis=1)[:, :count].astype(np.int32)
    chosen = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    return Distributions(np.zeros(41, np.float32), ids, chosen)


def exact(p: Any, q: Any) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("noise", [0.05, 0.2, 1.0])
def test_divergence_is_exact_with_all_tokens_and_near_and_below_it_with_some(noise: float) -> None:
    p, q = pair(noise)
    true = exact(p, q)
    whole = divergence_T(likeliest(p, VOCABULARY), likeliest(q, VOCABULARY)).mean()
    assert whole == pytest.approx(true, rel=1e-3)
    some = divergence_T(likeliest(p, 64), likeliest(q, 64)).mean()
    assert 0.6 * true < some <= true * (1 + 1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    p, q = pair(0.5)
    own = likeliest(p, 64)
    assert divergence_T(own, own).max() < 1e-6
    assert not flipped_T(own, own).any()
    assert flipped_T(own, likeliest(q, 64)).mean() == pytest.approx(
        (p.argmax(axis=1) != q.argmax(axis=1)).mean()
    )


def test_vllms_lists_are_read_at_the_learnt_positions() -> None:
    class Flat:
        """Three tokens; at each but the first the token itself and the two likeliest."""

        start_indices = [0, 0, 3]
        token_ids = [7, 1, 2, 9, 9, 4]
        logprobs = [-5.0, -0.5, -1.0, -0.25, -0.25, -2.0]

    found = _read(Flat(), [2])
    assert found.losses_S.tolist() == [5.0, 0.25]
    assert found.ids_TK.tolist() == [[9, 4]]
    assert found.logprobs_TK.tolist() == [[-0.25, -2.0]]


def rows(increase: float) -> list[dict[str, Any]]:
    p, q = pair(0.1)
    answers = {f"row-{at}": {"answer": "yes", "finish_reason": "stop"} for at in range(40)}
    changed = answers | {"row-3": {"answer": "no", "finish_reason": "length"}}
    found = []
    for at in range(40):
        item = Item(f"row-{at}", [Scored([0] * (at + 2), list(range(1, at + 2)))], [1], "yes")
        losses = np.full(at + 1, 2.0 + at / 10, np.float32)
        parent = Distributions(losses, likeliest(p, 8).ids_TK[:1], likeliest(p, 8).logprobs_TK[:1])
        child = Distributions(
            losses * (1 + increase), likeliest(q, 8).ids_TK[:1], likeliest(q, 8).logprobs_TK[:1]
        )
        source = "tickets" if at % 2 else "mails"
        found.append(figures.row_of(item, source, [parent], [child], (answers, changed), ["chrf"]))
    return found


def test_figures_are_paired_and_sliced_by_source_and_length() -> None:
    found = figures.summarize(rows(0.02), ["chrf"], 0.95, 0)
    total = found["total"]
    same = {"value": 0.02, "low": 0.02, "high": 0.02}
    assert total["loss_increase"] == pytest.approx(same, rel=1e-4)
    assert total["loss"]["value"] == pytest.approx(1.02 * total["parent_loss"]["value"])
    assert total["flipped_answers"]["value"] == pytest.approx(1 / 40)
    assert total["chrf_change"]["value"] < 0 <= total["chrf_change"]["high"] + 1e-9
    assert found["slices"]["source"].keys() == {"mails", "tickets"}
    quartiles = found["slices"]["length"]
    assert [part["rows"] for part in quartiles.values()] == [10] * 4
    losses = [part["parent_loss"]["value"] for part in quartiles.values()]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_rates_are_compared_round_by_round() -> None:
    found = figures.rate_change(64, [1.0, 2.0, 4.0], [1.5, 3.0, 6.0], 0.95, 0)
    assert found["change"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert found["tokens_per_s"]["value"] == pytest.approx(192 / 7)


def test_a_golden_prompt_is_answered_by_text_with_an_end() -> None:
    parent = {name: {"answer": "two", "finish_reason": "stop"} for name in "abc"}
    child = parent | {
        "b": {"answer": " \n", "finish_reason": "stop"},
        "c": {"answer": "two", "finish_reason": "abort"},
    }
    counted = figures.golden((parent, child), ["a", "b", "c"])
    assert counted == {"asked": 3, "answered": 1, "by_parent": 3}
