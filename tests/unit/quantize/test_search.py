"""What `scheme: auto` makes of figures, and what a recipe may ask of it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith.config.schema.quantize import Quantize, Search
from tunesmith.quantize.search import Tried, choose, explain, pareto


def tried(
    scheme: str, size: int, loss: float | None, rate: float | None, state: str = "approved"
) -> Tried:
    return Tried(scheme, (), f"checkpoint-{scheme}", None, size, state, (), loss, rate)


SMALL = tried("w4a16", 50, 0.020, 90.0, "refused")
MIDDLE = tried("w8a8-int8", 80, 0.002, 120.0)
LARGE = tried("fp8-dynamic", 85, 0.001, 100.0)


@pytest.mark.parametrize(
    ("minimize", "best"), [("size", MIDDLE), ("time", MIDDLE), ("loss", LARGE)]
)
def test_the_best_of_the_approved(minimize: Literal["size", "time", "loss"], best: Tried) -> None:
    settings = Search(minimize=minimize)
    assert choose([SMALL, LARGE, MIDDLE], settings) == best
    assert choose([SMALL], settings) is None
    assert "w4a16" in explain(best, [SMALL, LARGE, MIDDLE], settings)


figures = st.builds(
    tried,
    st.sampled_from(["a", "b", "c", "d"]),
    st.integers(1, 5),
    st.integers(0, 5).map(float),
    st.integers(1, 5).map(float),
)


@given(st.lists(figures, min_size=1, max_size=8))
def test_nothing_beats_what_is_in_the_pareto_set(found: list[Tried]) -> None:
    def beats(one: Tried, other: Tried) -> bool:
        a = (one.bytes, one.loss_increase or 0, -(one.tokens_per_s or 0))
        b = (other.bytes, other.loss_increase or 0, -(other.tokens_per_s or 0))
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    best = pareto(found)
    assert best
    assert not any(beats(other, one) for one in best for other in found)
    assert all(one in best or any(beats(other, one) for other in found) for one in found)


def test_what_was_never_measured_is_in_no_set() -> None:
    unverified = tried("w3a16", 10, None, None, "unverified")
    assert pareto([unverified, MIDDLE]) == [MIDDLE]
    assert choose([unverified], Search()) is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"scheme": "auto", "group_size": 64}, "is not for w8a8-int8"),
        ({"scheme": "auto", "verify_rows": 0}, "judges what it tries"),
        ({"scheme": "auto", "search": {"candidates": ["w5a5"]}}, "candidates"),
        (
            {"scheme": "auto", "search": {"candidates": ["fp8-dynamic"]}, "device": "cpu"},
            "no usable FP8 kernel",
        ),
    ],
)
def test_what_no_search_can_try_is_refused_while_it_is_read(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        Quantize.model_validate(section)


def test_a_search_that_names_no_candidates_takes_what_the_device_runs() -> None:
    section = Quantize.model_validate({"scheme": "auto", "device": "cpu"})
    assert section.schemes == ("auto",) and section.calibrates("auto")
    wider = section.model_copy(update={"max_kl": 0.2})
    assert section.choices("auto") != wider.choices("auto")
    assert section.choices("w4a16") == wider.choices("w4a16")
