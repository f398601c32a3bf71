"""What an engine's process and the pool say to each other beside requests and answers.

Not in the worker's own module: run as `__main__`, its classes would have another name there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.engine.spec import EngineSpec


@dataclass(frozen=True)
class Setup:
    """What a worker is told before it loads anything."""

    spec: EngineSpec
    cores: tuple[int, ...] = ()
    """Processor cores to stay on; all that it inherits when empty."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    max_model_len: int
    load_s: float


class Refused(Exception):
    """The engine does not take a request; the message is vLLM's."""
