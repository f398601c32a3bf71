"""Hand an artifact on: to a folder, to storage beyond this machine, or to a model hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.config.errors import GateError, TunesmithError, UserError, require
from tunesmith.ledger.durable import sync_tree
from tunesmith.ledger.manifest import MANIFEST, Artifact, hash_file
from tunesmith.ledger.store import RESOLVED, Store

HUB = "hub:"
CARD = "README.md"
_MODELS = ("adapter", "base", "checkpoint")


def deliver(store: Store, artifact: Artifact, target: str, *, public: bool = False) -> str:
    """Copy a model with its manifest and a card; returns where it can be found.

    The bytes are compared with the manifest before they leave. Raises UserError when the target is
    taken or no place for a model, GateError when the artifact is damaged.
    """
    if artifact.manifest.kind not in _MODELS:
        raise UserError(f"{artifact.id} is no model; only {', '.join(_MODELS)} can be exported")
    if faults := store.faults(artifact):
        raise GateError("\n".join([f"{artifact.id} is damaged and stays here:", *faults]))
    # The recipe names places of this machine, and the ledger's address may have a password.
    files = {name: artifact.root / name for name in artifact.manifest.files if name != RESOLVED}
    files[MANIFEST] = artifact.folder / MANIFEST
    texts = {} if CARD in files else {CARD: model_card(store, artifact)}
    if target.startswith(HUB):
        return _to_hub(artifact.id, files, texts, target.removeprefix(HUB), public)
    if "://" in target:
        return _to_storage(files, texts, target)
    return _to_folder(artifact, files, texts, Path(target))


def model_card(store: Store, artifact: Artifact) -> str:
    """What it is, what it was made from and how to run it, for a reader who has only the folder."""
    manifest = artifact.manifest
    serve = "vllm serve ."
    if manifest.kind == "adapter":
        serve = f"vllm serve BASE --enable-lora --lora-modules {manifest.name}=."
    metrics = manifest.metrics
    facts = {
        "made by": f"Tunesmith, recipe `{manifest.name}`",
        "artifact": f"`{artifact.id}` ({manifest.label})",
        "scheme": metrics.get("scheme"),
        "size": f"{sum(entry.size_bytes for entry in manifest.files.values()) / 1e6:,.1f} MB",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value]
    ancestors = store.ancestors(artifact)
    lineage = [f"- `{one.id}`: {one.manifest.label} of `{one.manifest.name}`" for one in ancestors]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            f"# {manifest.name}: {manifest.label}",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "Everything needed to run it without a network is in this folder:",
            "",
            f"    {serve}",
            "",
            f"`{MANIFEST}` has the SHA-256 of the files and what decided the result."
            + (" It was made from:" if lineage else ""),
            "",
            *lineage,
            "",
        ]
    )


def _to_folder(
    artifact: Artifact, files: Mapping[str, Path], texts: Mapping[str, str], target: Path
) -> str:
    if target.exists():
        raise UserError(f"{target} exists already; name a folder that does not")
    half = target.with_name(f".{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        for name, source in files.items():
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, half / name)
        for name, text in texts.items():
            (half / name).write_text(text, encoding="utf-8")
        sync_tree(half)
        for name, entry in artifact.manifest.files.items():
            if name in files and hash_file(half / name) != entry.sha256:
                raise TunesmithError(f"{half / name} is not what was written; is the disk sound?")
        os.rename(half, target)
    except OSError as error:
        raise TunesmithError(f"cannot write to {target}: {error}") from error
    return str(target.absolute())


def _to_storage(files: Mapping[str, Path], texts: Mapping[str, str], target: str) -> str:
    """The manifest goes last: where it is, all else is too."""
    fsspec = require("fsspec", "train")
    try:
        system, folder = fsspec.core.url_to_fs(target)
    except (ImportError, ValueError) as error:
        raise UserError(f"{target}: {error}") from error
    if system.exists(str(PurePosixPath(folder) / MANIFEST)):
        raise UserError(f"{target} holds a model already; name a folder that does not")
    for name, text in texts.items():
        path = str(PurePosixPath(folder) / name)
        system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        system.pipe_file(path, text.encode())
    for name, source in sorted(files.items(), key=lambda item: item[0] == MANIFEST):
        path = str(PurePosixPath(folder) / name)
        system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        system.put_file(str(source), path)
        if (size := system.size(path)) != source.stat().st_size:
            raise TunesmithError(f"{target}: {name} arrived with {size} bytes; export it again")
    return target


def _to_hub(
    artifact_id: str, files: Mapping[str, Path], texts: Mapping[str, str], name: str, public: bool
) -> str:
    """One commit, so that nobody sees half of a model. A new repository is private unless asked."""
    hub: Any = require("huggingface_hub", "train")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{HUB}{name}: write it as {HUB}OWNER/NAME")
    adds = [hub.CommitOperationAdd(at, str(path)) for at, path in files.items()]
    adds += [hub.CommitOperationAdd(at, text.encode()) for at, text in texts.items()]
    api = hub.HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        done = api.create_commit(name, adds, commit_message=f"Export {artifact_id}")
    except (hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError, OSError) as error:
        raise TunesmithError(f"{HUB}{name}: the hub refused it: {error}") from error
    return str(done.commit_url)
