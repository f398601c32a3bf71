"""What a batch job reads, before any of it is read: its input and its adapters, with digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tunesmith.config.errors import DataError, ModelError, UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.ledger import Artifact, Draft, Store
from tunesmith.pipeline.files import InputFile, find_files, is_uri
from tunesmith.pipeline.sources import hub_commit

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv")
_SAVED = ("dataset_info.json", "dataset_dict.json")
NO_ADAPTER = "base"


def batch_files(batch: Batch) -> list[InputFile]:
    """The files of the input, in order; none when it is a hub data set.

    Raises UserError when there is no such file, or one is of a kind that is not read.
    """
    if is_saved_dataset(batch):
        return [InputFile(str(path)) for path in sorted(Path(batch.input).rglob("*.arrow"))]
    found = find_files(batch.input, SUFFIXES)
    if not found and is_hub_dataset(batch):
        return []
    if not found:
        folder = Path(batch.input)
        if not is_uri(batch.input) and folder.is_dir():
            raise UserError(
                f"batch.input: {batch.input} has no {', '.join(SUFFIXES)} file, and is not a data "
                "set that was saved to disk"
            )
        raise UserError(f"batch.input: no such file: {batch.input} (relative to {Path.cwd()})")
    if len(found) > 1:
        for file in found:
            if file.suffix not in SUFFIXES:
                raise UserError(
                    f"batch.input: {file.place} is not a {', '.join(SUFFIXES)} file; give a "
                    "pattern that leaves it out"
                )
    return found


def is_saved_dataset(batch: Batch) -> bool:
    """Whether the input is a folder that `Dataset.save_to_disk` wrote."""
    folder = Path(batch.input)
    return not is_uri(batch.input) and any((folder / name).is_file() for name in _SAVED)


def is_hub_dataset(batch: Batch) -> bool:
    """Whether the input is a hub id, `owner/name`: nothing here, and nothing like a path."""
    name = batch.input
    return (
        not is_uri(name)
        and not Path(name).exists()
        and not name.startswith((".", "/", "~"))
        and InputFile(name).suffix not in SUFFIXES
        and not {*"*?["} & {*name}
        and name.count("/") <= 1
    )


def digest_batch(store: Store, batch: Batch) -> str:
    """What changes whenever the input's rows could: a SHA-256 over all files, or a commit."""
    files = batch_files(batch)
    if not files:
        try:
            return f"{batch.input}@{hub_commit(batch.input, batch.revision, 'dataset')}"
        except DataError as error:
            raise UserError(
                f"batch.input: no such file: {batch.input} (relative to {Path.cwd()}), and no hub "
                "data set that can be reached is called so"
            ) from error
    if len(files) == 1:
        return files[0].digest(store)
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {file.digest(store)}\n".encode())
    return whole.hexdigest()


def adapter_of(store: Store, reference: str, own: Draft | None) -> Artifact | Draft | Path | None:
    """What an entry of `batch.adapters` names: an artifact, the recipe's own, a folder, or none.

    Raises UserError when it is none of them.
    """
    if reference == NO_ADAPTER:
        return None
    if reference == "adapter":
        if own is None:
            raise UserError("batch.adapters: this recipe trains no adapter")
        return own
    folder = Path(reference)
    if folder.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ModelError(f"batch.adapters: {reference} has no {name}")
        return folder
    found = store.get(reference)
    if found.manifest.kind != "adapter":
        raise ModelError(f"batch.adapters: {reference} is a {found.manifest.kind}, not an adapter")
    return found


def digest_adapter(store: Store, folder: Path) -> str:
    """SHA-256 over the files of an adapter that is not an artifact."""
    whole = hashlib.sha256()
    for name, digest in sorted(store.digest_folder(folder).items()):
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()
