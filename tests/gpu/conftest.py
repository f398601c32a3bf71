"""Tests of what only a GPU can do; without one they are skipped, and the summary says why."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none")
    return torch.device("cuda")
