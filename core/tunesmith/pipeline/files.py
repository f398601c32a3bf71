"""Files here and at URIs: found by name, folder or pattern, read as bytes, hashed.

A local file takes nothing but the standard library; other places go through fsspec, which knows
`s3://`, `gs://`, `az://`, `memory://` and more by package.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from tunesmith.config.errors import DataError, MissingExtraError, UserError, require
from tunesmith.ledger import Store

_PATTERN = frozenset("*?[")
_CHUNK_BYTES = 1 << 20
# What changes with the content, as the places name it.
_CHECKSUMS = ("ETag", "etag", "md5Hash", "content_md5")
# Package and extra by protocol; any other that fsspec knows works too.
_EXTRAS = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
}


def is_uri(place: str) -> bool:
    """Whether a place is named by protocol, `s3://bucket/key`, rather than by path."""
    return "://" in place


@dataclass(frozen=True)
class InputFile:
    """One file of an input."""

    place: str
    """Path or URI."""

    @property
    def name(self) -> str:
        """The last part of the place."""
        return PurePosixPath(self.place).name

    @property
    def suffix(self) -> str:
        """What the content is: `.jsonl` of `rows.jsonl.gz`."""
        path = PurePosixPath(self.name)
        return PurePosixPath(path.stem).suffix if path.suffix in _OPENERS else path.suffix

    def open_raw(self) -> BinaryIO:
        """The bytes as they are stored."""
        if not is_uri(self.place):
            return Path(self.place).open("rb")
        fs, path = file_system(self.place)
        return cast(BinaryIO, fs.open(path, "rb"))

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes with compression undone. Raises DataError when they cannot be read."""
        try:
            with self.open_raw() as raw:
                opener = _OPENERS.get(PurePosixPath(self.name).suffix)
                yield opener(raw) if opener else raw
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"cannot read {self.place}: {_reason(error)}") from error

    def digest(self, store: Store) -> str:
        """SHA-256 of the stored bytes, or the checksum that the place itself keeps of them."""
        if not is_uri(self.place):
            return store.digest(Path(self.place))
        fs, path = file_system(self.place)
        try:
            info = fs.info(path)
            if kept := next((info[name] for name in _CHECKSUMS if info.get(name)), None):
                return f"{kept}".strip('"')
            whole = hashlib.sha256()
            with fs.open(path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    whole.update(chunk)
            return whole.hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {self.place}: {_reason(error)}") from error


def find_files(place: str, suffixes: Sequence[str]) -> list[InputFile]:
    """A file, the files of a folder with one of these suffixes, or those that match a pattern; in
    the order of their names. Empty when there is nothing there."""
    if not is_uri(place):
        return [InputFile(str(path)) for path in _local(place, suffixes)]
    fs, path = file_system(place)
    try:
        if _PATTERN & set(path):
            found = [one for one in fs.glob(path) if not _is_hidden(one)]
        elif fs.isdir(path):
            found = [one for one in fs.find(path) if _is_part(one, path, suffixes)]
        else:
            found = [path] if fs.exists(path) else []
    except (OSError, ValueError) as error:
        raise DataError(f"cannot list {place}: {_reason(error)}") from error
    return [InputFile(str(fs.unstrip_protocol(one))) for one in sorted(found)]


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path in it.

    Raises MissingExtraError where the package of its protocol is not installed.
    """
    fsspec = require("fsspec", "infer")
    protocol = place.partition("://")[0].rpartition("::")[2]
    try:
        fs, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        if known := _EXTRAS.get(protocol):
            raise MissingExtraError(*known) from error
        raise UserError(f"{place}: {error}") from error
    except ValueError as error:
        raise UserError(f"{place}: no protocol {protocol!r} is known ({error})") from error
    return fs, str(path)


def _local(place: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = [one for one in path.rglob("*") if one.is_file()]
        return sorted(one for one in found if _is_part(str(one), place, suffixes))
    if path.exists() or not _PATTERN & set(place):
        return [path] if path.is_file() else []
    pattern = path.relative_to(path.anchor) if path.is_absolute() else path
    root = Path(path.anchor) if path.is_absolute() else Path()
    found = [one for one in root.glob(str(pattern)) if one.is_file()]
    return sorted(one for one in found if not _is_hidden(str(one)))


def _is_hidden(path: str) -> bool:
    """What a pattern of a shell leaves out: a file that is being written, for one."""
    return PurePosixPath(path).name.startswith(".")


def _is_part(path: str, folder: str, suffixes: Sequence[str]) -> bool:
    """Whether a file of a folder is data, and not a marker or a file that is being written."""
    below = PurePosixPath(path.removeprefix(folder).lstrip("/"))
    hidden = any(part.startswith((".", "_")) for part in below.parts)
    return not hidden and InputFile(path).suffix in suffixes


def _zstd(raw: BinaryIO) -> BinaryIO:
    stream = require("pyarrow", "infer").CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream)


_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or str(error) or type(error).__name__
