from __future__ import annotations

import pytest

from tunesmith.evaluate.refusal import refusal

DEVICES = {"cpu": "no kernel", "sm_80": None, "sm_90": None, "sm_100": "too new"}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "no kernel"), (80, None), (86, None), (90, None), (100, "too new"), (120, "too new"),
     (75, None)],
)  # fmt: skip
def test_a_device_counts_as_the_nearest_older_one(
    capability: int | None, expected: str | None
) -> None:
    assert refusal(DEVICES, capability) == expected
