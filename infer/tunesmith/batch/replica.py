"""One engine of a batch on a Ray cluster: what runs inside an actor of Ray Data's pool."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tunesmith.config import ModelError, TunesmithError
from tunesmith.engine import Answer, EnginePool, EngineSpec, Request

PACK = "pack"
"""The one column of all blocks: a pickled list of requests, or `Answers`."""

_POLL_S = 0.05
_PIECES, _PIECE_BYTES = 16, 65536


@dataclass(frozen=True)
class Answers:
    """What comes back for one pack of requests, and how its engine does."""

    replica: str
    max_model_len: int = 0
    load_s: float = 0.0
    restarts: int = 0
    retried: int = 0
    made: list[tuple[int, Answer | Exception]] = field(default_factory=list)
    failure: str | None = None
    """Why this engine will answer nothing any more."""

    is_refusal: bool = False
    """Whether the model is the reason."""


class Replica:
    """Keeps one engine full from all the packs that Ray Data has given to its actor.

    The engine is a process below the actor, so its death is not the actor's, and a row that kills
    it is set aside here as on one machine. Calls come from several threads.
    """

    def __init__(self, spec: EngineSpec, prints: Mapping[Path, str], window: int) -> None:
        self._spec, self._prints, self._window = spec, prints, window
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[Request] = SimpleQueue()
        self._callers: dict[int, list[SimpleQueue[Any]]] = {}
        self._failure: Answers | None = None
        self._pool: EnginePool | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, batch: Any) -> Any:
        """Answers to one pack; to an empty one as soon as the engine is up."""
        import pyarrow

        packs = [pickle.loads(pack.as_py()) for pack in batch[PACK]]
        answers = [pickle.dumps(self._answers(requests)) for requests in packs]
        return pyarrow.table({PACK: answers})

    def _answers(self, requests: list[Request]) -> Answers:
        while not (self._failure or (self._pool and self._pool.load_s)):
            time.sleep(_POLL_S)
        answered: SimpleQueue[Any] = SimpleQueue()
        with self._lock:
            if self._failure:
                return self._failure
            for request in requests:
                callers = self._callers.setdefault(request.key, [])
                callers.append(answered)
                if len(callers) == 1:  # else it is in the engine: a lost node's rows come again
                    self._inbox.put(request)
        pool = self._pool
        assert pool
        pool.wake()
        made = []
        for _ in requests:
            if isinstance(one := answered.get(), Answers):
                return one
            made.append(one)
        return Answers(
            self._name, pool.max_model_len, pool.load_s, pool.restarts, pool.retried, made
        )

    def _work(self) -> None:
        """The engine's life, in a thread of its own."""
        try:
            check_folders(self._prints)
            # Kept, because a log is asked for when all else is gone; Ray ends actors by SIGKILL.
            logs = Path(tempfile.mkdtemp(prefix="tunesmith-engine-"))
            self._pool = EnginePool(self._spec, window=self._window, log_folder=logs)
            with self._pool:
                for request, made in self._pool.stream(self._requests()):
                    self._deliver(request.key, made)
        except Exception as error:
            words = str(error) if isinstance(error, TunesmithError) else repr(error)
            self._fail(f"{self._name}: {words}", isinstance(error, ModelError))

    def _requests(self) -> Iterator[Request | None]:
        """Without end; None where there is no other at the moment."""
        while True:
            try:
                yield self._inbox.get_nowait()
            except Empty:
                yield None

    def _deliver(self, key: int, made: Answer | Exception) -> None:
        with self._lock:
            callers = self._callers.pop(key, [])
        for caller in callers:
            caller.put((key, made))

    def _fail(self, words: str, is_refusal: bool) -> None:
        with self._lock:
            self._failure = Answers(self._name, failure=words, is_refusal=is_refusal)
            waiting = [caller for callers in self._callers.values() for caller in callers]
            self._callers.clear()
        for caller in waiting:
            caller.put(self._failure)


def folder_prints(spec: EngineSpec) -> dict[Path, str]:
    """What the model's folders look like here, for every other node to compare with."""
    folders = {spec.model, *spec.all_adapters}
    return {folder: folder_print(folder) for folder in folders}


def folder_print(folder: Path) -> str:
    """A hash over names, sizes and samples of all files: a full one would read gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
                if size <= _PIECE_BYTES:
                    break
    return digest.hexdigest()


def check_folders(prints: Mapping[Path, str]) -> None:
    """Raises ModelError when this node has other files than the one that started the batch."""
    for folder, expected in prints.items():
        advice = (
            "every node needs the same files under the same path; put store.folder (and a local "
            "model.base) on a file system that all nodes share, or copy it to each"
        )
        if not folder.is_dir():
            raise ModelError(f"the model's folder {folder} is not on this node; {advice}")
        if folder_print(folder) != expected:
            raise ModelError(f"the model's folder {folder} has other files on this node; {advice}")
