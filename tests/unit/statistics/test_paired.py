from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunesmith.config import TunesmithError
from tunesmith.statistics import MIN_ROWS, compare, level


def rows(losses: Any, tokens: Any, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{at}", "completion_loss_sum_nats": float(loss), "completion_tokens": int(count)}
        | {key: float(values[at]) for key, values in more.items()}
        for at, (loss, count) in enumerate(zip(losses, tokens, strict=True))
    ]


def test_loss_is_per_token_over_all_rows_not_a_mean_of_rows() -> None:
    found = level(rows([2.0, 30.0], [1, 10]), "completion_loss", 0.95, seed=0)
    assert found is not None
    assert found.value == pytest.approx(32 / 11)


def test_difference_is_signed_and_paired_by_id_in_any_order() -> None:
    tokens = np.arange(5, 25)
    ours, theirs = rows(tokens * 2.2, tokens), rows(tokens * 2.0, tokens)
    found = compare(ours[:-4], theirs[::-1], "completion_loss", 0.95, seed=0)
    assert found is not None and found.relative is not None
    assert found.rows == 16
    assert found.difference == pytest.approx((0.2, 0.2, 0.2))
    assert found.relative == pytest.approx((0.1, 0.1, 0.1))
    assert found.excludes_zero


def test_noise_alone_shows_no_difference_and_a_real_one_shows() -> None:
    """At a level of 95 %, pure noise is called a difference in about one of twenty trials."""
    random = np.random.default_rng(2)
    false_alarms = found_shifts = 0
    for trial in range(100):
        tokens = random.integers(4, 40, size=120)
        base = tokens * random.gamma(4.0, 0.5, size=120)
        noise = tokens * random.normal(0.0, 0.05, size=120)
        for shift in (0.0, 0.03):
            found = compare(
                rows(base + noise + shift * tokens, tokens),
                rows(base, tokens),
                "completion_loss",
                0.95,
                seed=trial,
            )
            assert found is not None
            if shift:
                found_shifts += found.excludes_zero
            else:
                false_alarms += found.excludes_zero
    assert false_alarms <= 12
    assert found_shifts >= 98


def test_text_metrics_weigh_each_row_once() -> None:
    ours = rows([1.0] * 12, range(1, 13), chrf=[60.0] * 12)
    theirs = rows([1.0] * 12, range(1, 13), chrf=[50.0] * 11 + [62.0])
    found = compare(ours, theirs, "chrf", 0.95, seed=0)
    assert found is not None
    assert found.difference.value == pytest.approx(9.0)
    assert found.relative is None


def test_too_few_rows_never_show_a_difference() -> None:
    few = MIN_ROWS - 1
    found = compare(rows([3.0] * few, [1] * few), rows([1.0] * few, [1] * few), "completion_loss",
                    0.95, seed=0)  # fmt: skip
    assert found is not None
    assert not found.excludes_zero


def test_what_is_not_there_is_not_compared() -> None:
    assert level(rows([1.0], [1]), "chrf", 0.95, seed=0) is None
    assert compare(rows([1.0], [1]), [], "completion_loss", 0.95, seed=0) is None


def test_losses_over_other_tokens_are_refused() -> None:
    with pytest.raises(TunesmithError, match="tokenise the same rows differently"):
        compare(rows([1.0], [4]), rows([1.0], [5]), "completion_loss", 0.95, seed=0)
