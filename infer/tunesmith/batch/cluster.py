"""A Ray cluster as a batch finds it: whether it is there, and how many engines it has room for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass

from tunesmith.config import UserError
from tunesmith.config.errors import require

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # of this process alone
}
_REACH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Share:
    """What Ray reserves for each engine."""

    replicas: int
    num_cpus: float
    num_gpus: float

    def __len__(self) -> int:
        return self.replicas

    @property
    def devices(self) -> int:
        """What is paid for: GPUs, or machines where there is none."""
        return self.replicas * max(1, int(self.num_gpus))


def share_of(nodes: list[dict[str, float]], replicas: int | None, gpus_each: int) -> Share:
    """Engines for the resources of the living nodes: GPUs where there are any, else one engine on
    the CPUs of each node. Raises UserError when there is no room for that many."""
    if any(node.get("GPU", 0) for node in nodes):
        most = sum(int(node.get("GPU", 0)) // gpus_each for node in nodes)
        share = Share(replicas or most, 0, gpus_each)
        what = f"{gpus_each} GPUs"
    else:
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        replicas = replicas or len(cores)
        per_node = max(1, -(-replicas // max(1, len(cores))))
        num_cpus = max(1, min(cores, default=0) // per_node)
        most = sum(count // num_cpus for count in cores)
        share, what = Share(replicas, num_cpus, 0), f"{num_cpus} CPUs"
    if not 0 < share.replicas <= most:
        raise UserError(
            f"batch.replicas: the cluster has room for {most} engines of {what} each, not for "
            f"{max(1, share.replicas)}; ask for fewer, or add nodes"
        )
    return share


def connect(address: str | None, replicas: int | None, gpus_each: int) -> Share:
    """Join the cluster as a driver on one of its nodes, and see what it has room for.

    Raises UserError when it is not there or too small.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    ray = require("ray", "ray")
    require("ray.data", "ray")
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    if wanted.startswith("ray://"):
        raise UserError(
            f"batch.cluster_address: {wanted} is Ray's client, through which Ray Data does not "
            "run; start the command on a node of the cluster (or with `ray job submit`) and leave "
            "the address out"
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _reach(wanted)
        ray.init(wanted, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"batch.cluster: no Ray cluster at {wanted}: {error}; start one with `ray start "
            "--head`, or name its address in batch.cluster_address"
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_of(nodes, replicas, gpus_each)


def _reach(address: str) -> None:
    """Raise OSError when nobody listens there: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S):
            pass
