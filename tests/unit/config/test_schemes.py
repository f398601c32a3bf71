from __future__ import annotations

import pytest

from tunesmith.config.schemes import SCHEMES, Scheme, refusal, schemes_in

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


def test_a_cpu_with_amx_is_a_device_of_its_own_where_the_table_knows_it() -> None:
    assert refusal(DEVICES, None, has_amx=True) == "no kernel"
    assert refusal(DEVICES | {"cpu_amx": None}, None, has_amx=True) is None
    assert refusal(DEVICES | {"cpu_amx": None}, None) == "no kernel"


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_checkpoint_is_known_by_its_config(scheme: Scheme) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    group = preset_name_to_scheme(scheme.preset, ["Linear"])
    config = QuantizationConfig(config_groups={"weights": group}).model_dump(mode="json")
    assert schemes_in(config) == [scheme]
    assert schemes_in({}) == []
