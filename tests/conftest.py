"""What holds for every test: the same examples in every run, and cores of its own for each process.

`pytest --hypothesis-profile=explore` looks for other examples.
"""

import os

import pytest
from hypothesis import settings

# Without a deadline: on a machine that others use too, one example may take long.
settings.register_profile("same", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Threads of two engines that share a core wait for each other's."""
    if worker := getattr(config, "workerinput", None):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]
        os.sched_setaffinity(0, own or cores)
