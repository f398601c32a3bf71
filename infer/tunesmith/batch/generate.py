"""From rows without a result to results in shards, through engines that may die."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.batch.cluster import Share
from tunesmith.batch.errors import RowError, refusal
from tunesmith.batch.prepare import Ahead, Digests, Prepared, Same, Wrong, prepare
from tunesmith.batch.progress import Rate
from tunesmith.batch.ray_pool import RayPool
from tunesmith.batch.requests import RequestMaker
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards
from tunesmith.batch.writer import Writer
from tunesmith.config import WorkInterrupted
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import Answer, Crashed, EnginePool, EngineSpec, Place, Request
from tunesmith.terminal import log, progress_bar


@dataclass(frozen=True)
class Job:
    """A batch whose rows were counted."""

    section: Batch
    spec: EngineSpec
    places: list[Place] | Share
    """Of the engines: on this machine, or on a cluster."""

    valid: int
    """Rows without a fault of their own."""

    usd_per_s: float | None


def generate(job: Job, shards: Shards) -> float:
    """Give every valid row that has no result one; returns the seconds that the engine loaded.

    Whatever ends it, results that were finished are in the shards. A kill loses at most three
    times `engine.max_num_seqs` rows of each engine: those in flight, and the next shard. SIGTERM
    and Ctrl-C let what is in flight finish; a second one does not. Raises WorkInterrupted then.
    """
    size = job.spec.settings.max_num_seqs
    log(f"batch: starting the engine for {job.valid - shards.count} rows")
    pool = _pool(job, shards.folder.parent)
    rate = Rate(job.valid - shards.count, shards.seconds, job.usd_per_s)
    with (
        pool,
        progress_bar("batch", job.valid) as bar,
        Writer(shards, size, pool) as writer,
        _finish_on_signal(pool),
    ):
        bar.advance(shards.count)
        for made in _results(job, shards, pool, writer, rate):
            bar.advance(1, rate.note(made.output_tokens if made else 0, writer.errors))
    if pool.is_stopping and shards.count < job.valid:
        raise WorkInterrupted(
            f"stopped; {shards.count} of {job.valid} rows are kept: run the same command again "
            "to go on"
        )
    return pool.load_s


def _pool(job: Job, log_folder: Path) -> EnginePool | RayPool:
    size = job.spec.settings.max_num_seqs
    if isinstance(job.places, Share):
        return RayPool(job.spec, job.places, window=3 * size)  # a third of them is on the way
    return EnginePool(job.spec, job.places, window=2 * size, log_folder=log_folder)


def _results(
    job: Job, shards: Shards, pool: EnginePool | RayPool, writer: Writer, rate: Rate
) -> Iterator[Answer | None]:
    """Hand each row's result to the writer; yields the answer, or None where there is none."""
    others = 0

    def windows() -> Iterator[list[Prepared]]:
        maker = RequestMaker.open(job.spec, pool.max_model_len)
        digests = Digests()
        for row, digest in shards.digests():
            digests.first(digest, row)
        rows = (
            row for row in read_rows(job.section) if row.error is None and row.index not in shards
        )
        yield from prepare(rows, maker, digests, reuse=job.section.reuse)

    def requests() -> Iterator[Request]:
        nonlocal others
        writer.start()
        rate.start()
        for item in ahead:
            match item:
                case Wrong():
                    writer.add(item.index, item.error)
                case Same():
                    writer.add(item.index, item)
                case _:
                    yield item
                    continue
            others += 1

    pool.before_sending = writer.hand
    with closing(Ahead(windows)) as ahead:
        for request, made in pool.stream(requests()):
            if isinstance(made, Answer):
                writer.add(request.key, made, request.digest)
                yield made
            else:
                writer.add(request.key, _fault(request, made), request.digest)
                yield None
            for _ in range(others):
                yield None
            others = 0
        for _ in range(others):
            yield None


def _fault(request: Request, error: Exception) -> RowError:
    if isinstance(error, Crashed):
        return RowError("engine_crashed", str(error))
    return refusal(request, error)


@contextmanager
def _finish_on_signal(pool: EnginePool | RayPool) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C lets rows in flight finish; a second one interrupts, as does
    the first while no engine is up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        if pool.is_stopping or not pool.is_ready:
            raise KeyboardInterrupt
        pool.stop()
        log(f"batch: finishing {pool.open} rows in flight; once more to stop at once")

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
