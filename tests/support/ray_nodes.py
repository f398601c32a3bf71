"""A Ray cluster of two nodes on this machine, one of which can be killed."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STORE_BYTES = 80 * 2**20
# A dead node is known as such in seconds; one that is only slow gets as long as it does by default.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 3,
}


class TwoNodes:
    """A head, which the command runs on, and another node; one CPU and so one engine on each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._mark = f"TEST_CLUSTER={uuid.uuid4()}"
        name, value = self._mark.split("=")
        os.environ.update({name: value, "RAY_USAGE_STATS_ENABLED": "0"})
        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": _STORE_BYTES}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args=node | {"include_dashboard": False, "_system_config": _HEALTH},
        )
        self._other = self._cluster.add_node(**node)
        del os.environ[name]
        self.address: str = self._cluster.address

    def kill_other(self) -> None:
        """SIGKILL for all of the node that is not the head."""
        self._cluster.remove_node(self._other, allow_graceful=False)

    def engines(self) -> list[int]:
        """Processes of engines that run anywhere on the cluster."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = self._mark.encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            is_engine = b"tunesmith.engine.worker" in command and b"guard.py" not in command
            if is_ours and is_engine:
                found.append(int(entry.name))
        return found

    def engines_left(self, timeout_s: float) -> list[int]:
        """Those that are still there after so long; Ray ends them when it hears of the end."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self.engines()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return found

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Up within the block."""
    nodes = TwoNodes()
    try:
        yield nodes
    finally:
        nodes.shutdown()
