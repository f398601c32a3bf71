"""Runs a command so that nothing of it outlives the process that asked for it.

    python guard.py PARENT_PID COMMAND…

It is the leader of a session of its own, and the command and all its children are in its process
group. Its standard input is a pipe whose other end only the parent holds: when the parent dies, by
SIGKILL too, the kernel closes the pipe and the guard kills the group. SIGTERM is passed on to the
command alone, which ends its own children. When the command ends, for whatever reason, what is
left of the group is killed. Standard library only: it has to be up in milliseconds.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_CHECK_INTERVAL_S = 0.5


def _die_with_guard() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent_pid: int, command: list[str]) -> None:
    """Returns never: ends with SIGKILL of the group."""
    # What was passed on to the guard beyond the standard streams is meant for the command.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard, close_fds=False
    )
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while process.poll() is None:
        # A pipe that a fork of the parent still holds does not close: the parent's pid tells.
        closed, _, _ = select.select([sys.stdin], [], [], _CHECK_INTERVAL_S)
        if closed or os.getppid() != parent_pid:
            break
    else:
        print(f"guard: the command ended with {process.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
