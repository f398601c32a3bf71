"""Engines on a Ray cluster that answer a stream of requests, as `EnginePool` does on one machine.

Ray Data places the engines, feeds them and starts them again elsewhere; rows, shards and errors
stay with this process. Packs of requests go from here into a queue on this node, from there through
a source that Ray Data reads as it has room, to actors that each keep one engine full, and back.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from itertools import islice
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from tunesmith.batch.cluster import Share
from tunesmith.batch.replica import PACK, Answers, Replica, folder_prints
from tunesmith.config import ModelError, TunesmithError
from tunesmith.engine import Answer, EngineSpec, Request
from tunesmith.terminal import log

# Fewer rows in a message cost the driver more than the rows; with more of them, those that are done
# wait for the longest of the message.
_PACK_ROWS = 8
_CHECK_INTERVAL_S = 1.0
_END_TIMEOUT_S = 5.0


class RayPool:
    """Copies of one engine on the nodes of a Ray cluster.

    A node that is lost takes nothing with it: what was in flight anywhere is handed out again, the
    first answer to a row counts, and Ray starts the engine again where there is room.
    """

    def __init__(self, spec: EngineSpec, share: Share, *, window: int) -> None:
        self._spec, self._share, self._window = _absolute(spec), share, window
        self._output = ExitStack()
        self._open: dict[int, Request] = {}
        self._inbox: SimpleQueue[Answers | TunesmithError] = SimpleQueue()
        self._seen: dict[str, Answers] = {}
        self._is_up = threading.Event()
        self._failure: TunesmithError | None = None
        self._max_model_len = 0
        self._resent = self._lost_nodes = 0
        self.is_stopping = False
        self._is_closing = False
        self.load_s = 0.0
        self.before_sending: Callable[[int], None] = lambda _: None
        """Told how many requests go to the cluster next, for the first time."""

    def __enter__(self) -> RayPool:
        import ray
        import ray.util.queue

        # Ray prints what happens to its nodes, and stdout is for the result.
        self._output.enter_context(redirect_stdout(sys.stderr))
        self._nodes, self._checked_s = _living(ray), time.monotonic()
        here = ray.get_runtime_context().get_node_id()
        self._queue = ray.util.queue.Queue(
            actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": here}}
        )
        dataset = _dataset(self._queue, here, self._share, self._spec, self._window)
        self._thread = threading.Thread(target=self._receive, args=(dataset,), daemon=True)
        self._thread.start()
        self._put([])  # its answer tells how long a prompt may be
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray

        self._is_closing = True
        self._queue.actor.put.remote(pickle.dumps([]))  # wakes the receiving thread, if Ray lives
        self._thread.join(_END_TIMEOUT_S)
        ray.shutdown()
        self._output.close()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer; waits for the first engine, and raises what ended it."""
        self._is_up.wait()
        if self._failure:
            raise self._failure
        return self._max_model_len

    @property
    def open(self) -> int:
        """Requests that are on the cluster."""
        return len(self._open)

    @property
    def restarts(self) -> int:
        """Engines that were started again, by themselves or after their node was lost."""
        return sum(answers.restarts for answers in self._seen.values()) + self._lost_nodes

    @property
    def retried(self) -> int:
        """Requests that were given to an engine again, each time that they were."""
        return sum(answers.retried for answers in self._seen.values()) + self._resent

    @property
    def is_ready(self) -> bool:
        """Whether any engine is up, and so may be at requests."""
        return self._is_up.is_set() and self._failure is None

    def stop(self) -> None:
        """Hand out nothing more: `stream` ends with the answers to what is in flight.

        May be called from a signal handler.
        """
        self.is_stopping = True

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer | Exception]]:
        """Answers as they are done, each with its request.

        At most `window` requests for each engine are on the cluster, and `requests` is read no
        further. Raises ModelError when vLLM refuses the model or a node does not have it,
        TunesmithError when engines keep dying or Ray gives up.
        """
        _ = self.max_model_len  # no row is on its way before an engine is up
        most = self._window * self._share.replicas
        waiting, is_exhausted = iter(requests), False
        while True:
            while not (is_exhausted or self.is_stopping) and len(self._open) + _PACK_ROWS <= most:
                pack = list(islice(waiting, _PACK_ROWS))
                is_exhausted = len(pack) < _PACK_ROWS
                self._open |= {request.key: request for request in pack}
                if pack:
                    self.before_sending(len(pack))
                    self._put(pack)
            if not self._open and (is_exhausted or self.is_stopping):
                return
            yield from self._next()

    def _next(self) -> Iterator[tuple[Request, Answer | Exception]]:
        """Wait for the answers to one pack, and look after the nodes now and then."""
        if time.monotonic() - self._checked_s >= _CHECK_INTERVAL_S:
            self._resend_lost()
        try:
            answers = self._inbox.get(timeout=_CHECK_INTERVAL_S)
        except Empty:
            return
        if isinstance(answers, TunesmithError):
            raise answers
        self._seen[answers.replica] = answers
        for key, made in answers.made:
            if request := self._open.pop(key, None):
                yield request, made

    def _resend_lost(self) -> None:
        """Hand all open requests out again when a node is gone: which of them it had is not known,
        and an engine that has one of them already does not take it twice."""
        import ray

        living = _living(ray)
        lost, self._nodes = len(self._nodes - living), living
        self._checked_s = time.monotonic()
        if lost:
            self._lost_nodes += lost
            log(f"batch: {lost} node(s) lost; {self.open} rows in flight are handed out again")
            again = iter(list(self._open.values()))
            while pack := list(islice(again, _PACK_ROWS)):
                self._resent += len(pack)
                self._put(pack)

    def _put(self, pack: list[Request]) -> None:
        self._queue.put(pickle.dumps(pack))

    def _receive(self, dataset: Any) -> None:
        """Whatever comes from the cluster, in a thread, for Ray's waiting takes no signals."""
        try:
            for batch in dataset.iter_batches(
                batch_size=None, prefetch_batches=0, batch_format="pyarrow"
            ):
                if self._is_closing:
                    return
                for pickled in batch[PACK]:
                    self._take(pickle.loads(pickled.as_py()))
        except Exception as error:
            self._fail(
                TunesmithError(
                    f"Ray ended the batch: {_cause(error)}; what was finished is kept: see to the "
                    "cluster and run the same command again"
                )
            )

    def _take(self, answers: Answers) -> None:
        if answers.failure:
            kind = ModelError if answers.is_refusal else TunesmithError
            return self._fail(kind(answers.failure))
        self._max_model_len = answers.max_model_len
        self.load_s = self.load_s or answers.load_s
        self._is_up.set()
        self._inbox.put(answers)

    def _fail(self, error: TunesmithError) -> None:
        self._failure = self._failure or error
        self._inbox.put(error)
        self._is_up.set()


def _dataset(queue: Any, here: str, share: Share, spec: EngineSpec, window: int) -> Any:
    """Packs from the queue, through engines, to packs of answers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Packs are few rows that shall not wait for more of them: each is a block of its own.
    context.target_max_block_size = 1
    calls = -(-window // _PACK_ROWS)
    source = ray.data.read_datasource(
        _source(queue),
        override_num_blocks=1,
        num_cpus=0,
        # Here it cannot be lost without the batch, and so is never read twice.
        label_selector={"ray.io/node-id": here},
    )
    return source.map_batches(
        Replica,
        fn_constructor_args=(spec, folder_prints(spec), window),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=share.replicas,
            max_tasks_in_flight_per_actor=calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
    )


def _source(queue: Any) -> Any:
    """The queue as something that Ray Data reads."""
    import pyarrow
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read() -> Iterator[Any]:
        while True:
            yield pyarrow.table({PACK: [queue.get()]})

    class Packs(Datasource):
        """One endless read."""

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(read, unknown)]

    return Packs()


def _absolute(spec: EngineSpec) -> EngineSpec:
    """Other nodes have other working directories."""
    return replace(
        spec,
        model=spec.model.absolute(),
        adapter=spec.adapter and spec.adapter.absolute(),
        adapters={name: path and path.absolute() for name, path in spec.adapters.items()},
    )


def _living(ray: Any) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _cause(error: BaseException) -> str:
    """The last line of the innermost reason that Ray gives words to."""
    told = error
    while (inner := error.__cause__ or getattr(error, "cause", None)) is not None:
        error = inner
        told = error if str(error).strip() else told
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return f"{type(told).__name__}: {lines[-1] if lines else 'no reason given'}"
