"""What holds for every test: the same examples in every run, cores of its own for each process, and
what takes longest begins first.

`pytest --hypothesis-profile=explore` looks for other examples.
"""

import os

import pytest
from hypothesis import settings

# Without a deadline: on a machine that others use too, one example may take long.
settings.register_profile("same", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("same")

# Before anything imports torch, which makes a thread for each core: two that share one core spend
# their time waiting for each other.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    at, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[at::count] or [cores[at % len(cores)]])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what was given most time: begun last, it alone would keep the run from its end."""

    def allowed_s(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker else 0.0

    items.sort(key=allowed_s, reverse=True)
