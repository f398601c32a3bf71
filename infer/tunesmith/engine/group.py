"""A command and all its children as one process group that ends with whoever started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from tunesmith.engine import guard

_END_TIMEOUT_S = 10.0


def start_group(
    command: Sequence[str],
    *,
    log: BinaryIO,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command behind a guard, which is the leader of the group that is returned.

    The group is gone when the command ends and also when this process dies by SIGKILL.
    """
    return subprocess.Popen(
        [sys.executable, "-S", guard.__file__, str(os.getpid()), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group now, and wait until their memory is free again."""
    # The group may outlive its leader, and its id is not given to others before it is empty.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin
    process.stdin.close()
    # The others are init's to collect: SIGKILL is sent, but they may still be ending.
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while _has_living_members(process.pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _has_living_members(group: int) -> bool:
    """Whether a process of the group still runs; a zombie holds no memory and no port."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group, *_ = entry.read_text().rpartition(")")[2].split()
            if int(process_group) == group and state != "Z":
                return True
    return False
