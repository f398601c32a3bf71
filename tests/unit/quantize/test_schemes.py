from __future__ import annotations

import typing

import pytest

from tunesmith.config.schema.quantize import Scheme as SchemeName
from tunesmith.quantize.schemes import DEVICES, SCHEMES


def test_every_scheme_of_the_recipe_is_in_the_table_and_runs_somewhere() -> None:
    assert set(SCHEMES) == set(typing.get_args(SchemeName))
    for scheme in SCHEMES.values():
        assert scheme.refused_by.keys() < DEVICES.keys()
        assert all(reason for reason in scheme.refused_by.values())


@pytest.mark.parametrize(
    ("name", "group_size", "expected"),
    [
        ("w8a8-int8", None, 4096 * 1024 + 4096 * 2),
        ("fp8-dynamic", None, 4096 * 1024 + 4096 * 2),
        ("w4a16", 128, 4096 * 1024 // 2 + 4096 * 8 * 2 + 16),
        ("w4a16", 32, 4096 * 1024 // 2 + 4096 * 32 * 2 + 16),
    ],
)
def test_size_of_a_stored_layer(name: str, group_size: int | None, expected: int) -> None:
    assert SCHEMES[name].layer_bytes(4096, 1024, group_size) == expected
