"""What GPUs are rented for: `offers.yaml`, a sheet with the source and the day of every price."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Offer:
    """One price, and where it is from."""

    gpu_hour_usd: float
    source: str
    """Page of the vendor."""
    read_on: date
    read_in: str
    """Where the figure was read."""


@cache
def offers() -> dict[str, Offer]:
    """Every offer of the sheet by its name, `VENDOR/GPU`."""
    text = Path(__file__).with_name("offers.yaml").read_text(encoding="utf-8")
    return {
        name: Offer(price, sheet["source"], sheet["read_on"], sheet["read_in"])
        for sheet in yaml.safe_load(text)
        for name, price in sheet["offers"].items()
    }
