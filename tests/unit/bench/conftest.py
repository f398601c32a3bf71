"""A meter before an upstream of the test's own; the generator is one for all tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import upstream as support

from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Meter
from tunesmith.bench.traffic import Prompt
from tunesmith.config.schema.bench import Bench

OpenMeter = Callable[..., contextlib.AbstractAsyncContextManager[Meter]]


@pytest.fixture(scope="session")
def generator() -> Iterator[Generator]:
    with Generator() as started:
        yield started


@pytest.fixture
def upstream() -> type[support.Upstream]:
    return support.Upstream


@pytest.fixture
def metered(generator: Generator) -> OpenMeter:
    """A meter on a running stand-in."""

    @contextlib.asynccontextmanager
    async def opened(
        fake: support.Upstream, bench: Bench, prompts: list[Prompt] = support.PROMPTS
    ) -> AsyncIterator[Meter]:
        async with (
            support.served(fake) as url,
            support.metered(url, bench, generator, prompts) as meter,
        ):
            yield meter

    return opened
