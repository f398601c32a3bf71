"""The stand-in of `tests/support/upstream.py` in the engine's place."""

from __future__ import annotations

import pytest
from upstream import FakeEngine

from tunesmith.bench import rig


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    for name, value in {"starts": 0, "order": [], "refused": (), "slower": {}}.items():
        monkeypatch.setattr(FakeEngine, name, value)
    monkeypatch.setattr(rig, "EngineServer", FakeEngine)
    monkeypatch.setattr(rig, "measure_ceiling", lambda: None)
    return FakeEngine
