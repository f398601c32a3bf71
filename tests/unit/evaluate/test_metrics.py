from __future__ import annotations

import pytest

from tunesmith.evaluate.metrics import chrf, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Return the sum.", "return the sum", 100.0),
        ("the cat sat on the mat", "the cat lay on a mat", 200 * 4 / 12),
        ("b a", "a b", 50.0),
        ("police kill the gunman", "the gunman kill police", 50.0),
        ("кот спит", "кот не спит", 200 * 2 / 5),
        ("", "something", 0.0),
        ("", "", 100.0),
    ],
)
def test_rouge_l(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_chrf_orders_answers() -> None:
    reference = "Return the sum of two numbers."
    same, near, far = (
        chrf(answer, reference)
        for answer in (reference, "Returns the sum of numbers.", "Open a file for reading.")
    )
    assert same == pytest.approx(100.0)
    assert same > near > 50 > far
    assert chrf("", reference) == 0.0
