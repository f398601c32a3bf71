"""Nothing of a guarded command outlives its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import members

from tunesmith.engine import guard

# A parent that starts a guarded tree of three processes and then waits.
PARENT = f"""
import os, subprocess, sys, time
process = subprocess.Popen(
    [sys.executable, "-S", {guard.__file__!r}, str(os.getpid()), "sh", "-c",
     "trap '' TERM HUP; sleep 300 & sleep 300 & wait; wait"],
    stdin=subprocess.PIPE, start_new_session=True)
print(process.pid, flush=True)
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(20)  # holds the pipe's other end too
    os._exit(0)
time.sleep(300)
"""


def wait_for(group: int, count: int, timeout_s: float = 30.0) -> list[int]:
    deadline_s = time.monotonic() + timeout_s
    while len(members(group)) != count and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return members(group)


@pytest.fixture(params=["plain", "fork"])
def tree(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent and the group it guards: the guard, a shell, two children."""
    command = [sys.executable, "-c", PARENT, request.param]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout
        group = int(parent.stdout.readline())
        try:
            assert len(wait_for(group, 4)) == 4
            yield parent, group
        finally:
            for pgid in (parent.pid, group):
                if members(pgid):
                    os.killpg(pgid, signal.SIGKILL)


def test_sigkill_of_the_parent_ends_the_group(tree: tuple[subprocess.Popen[str], int]) -> None:
    parent, group = tree
    parent.kill()
    assert wait_for(group, 0) == []


def test_death_of_the_command_ends_its_children(tree: tuple[subprocess.Popen[str], int]) -> None:
    _, group = tree
    shell = next(
        pid
        for pid in members(group)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0")
    )
    os.kill(shell, signal.SIGKILL)
    assert wait_for(group, 0) == []


def test_death_of_the_guard_ends_the_command(tree: tuple[subprocess.Popen[str], int]) -> None:
    _, group = tree
    os.kill(group, signal.SIGKILL)
    # Its grandchildren are the parent's to end, by the group's id, which stays valid.
    assert len(wait_for(group, 2)) == 2
