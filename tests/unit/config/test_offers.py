"""The sheet of prices: every one has its source and its day, and a recipe can name it."""

from __future__ import annotations

from datetime import date

import pytest

from tunesmith.config.offers import offers
from tunesmith.config.schema.base import Price


def test_every_price_says_where_it_is_from() -> None:
    found = offers()
    assert len(found) > 20
    for name, offer in found.items():
        vendor, _, gpu = name.partition("/")
        assert vendor and gpu and 0.1 < offer.gpu_hour_usd < 50, name
        assert offer.source.startswith("https://") and offer.read_in.startswith("https://")
        assert date(2026, 1, 1) <= offer.read_on <= date.today()


def test_a_recipe_names_an_offer_or_a_price() -> None:
    named = Price.model_validate({"offer": "lambda/h100-sxm"})
    assert named.gpu_hour_usd == offers()["lambda/h100-sxm"].gpu_hour_usd
    assert Price.model_validate(named.model_dump()) == named, "as the resolved recipe has it"
    with pytest.raises(ValueError, match=r"no offer 'lambda/h900'; there are akash/a100"):
        Price.model_validate({"offer": "lambda/h900"})
    with pytest.raises(ValueError, match="leave out gpu_hour_usd, or offer"):
        Price.model_validate({"offer": "lambda/h100-sxm", "gpu_hour_usd": 1.0})
    with pytest.raises(ValueError, match="gpu_hour_usd"):
        Price.model_validate({})
