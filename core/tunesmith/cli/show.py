"""The views behind `tunesmith show` and `tunesmith verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.tree import Tree

from tunesmith.config import GateError
from tunesmith.ledger import Artifact, Row, Store
from tunesmith.pipeline.verdict import recorded_verdict
from tunesmith.terminal import log, make_table

View = tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]


def show(store: Store, reference: str | None, rebuild: bool) -> View:
    """All artifacts; those of a name with their versions and aliases; or one with its lineage."""
    if rebuild:
        log(f"{store.rebuild()} artifacts indexed again from their manifests")
    if reference is None:
        return {"artifacts": [_line(row) for row in store.index.all()]}, _list_table
    if "@" not in reference and (rows := store.index.all(reference)):
        aliases = store.index.aliases(reference)
        return {"artifacts": [_line(row) for row in rows], "aliases": aliases}, _list_table
    artifact = store.get(reference)
    return {
        "manifest": artifact.manifest.model_dump(mode="json"),
        "folder": str(artifact.folder),
        "verdict": _verdict(store, artifact),
        "up": _up(store, artifact),
        "down": _down(store, artifact.id),
    }, _detail


def verify(store: Store, reference: str) -> View:
    """Hash every file again; raises GateError naming each file that differs."""
    chain, faults = store.verify(reference)
    if faults:
        raise GateError("\n".join([f"{len(faults)} faults found:", *faults]))
    result = {
        "verified": [member.id for member in chain],
        "files": sum(len(member.manifest.files) for member in chain),
        "bytes": sum(f.size_bytes for member in chain for f in member.manifest.files.values()),
    }
    return (
        result,
        lambda found: (
            f"ok: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, "
            f"in {len(found['verified'])} artifacts"
        ),
    )


def _line(row: Row) -> dict[str, Any]:
    manifest = row.manifest
    return {
        "id": row.id,
        "name": row.name,
        "label": row.label,
        "version": row.version,
        "created_at": manifest.created_at.isoformat(timespec="seconds"),
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "device_seconds": manifest.cost.device_seconds,
        "usd": manifest.cost.usd,
    }


def _list_table(result: dict[str, Any]) -> Any:
    aliases = {target: alias for alias, target in result.get("aliases", {}).items()}
    rows = [
        (
            line["id"],
            line["name"],
            line["label"],
            f"v{line['version']}" + (f" @{aliases[line['id']]}" if line["id"] in aliases else ""),
            line["created_at"][:19].replace("T", " "),
            f"{line['size_bytes'] / 2**20:.1f}",
            f"{line['device_seconds']:.1f}",
            "" if line["usd"] is None else f"{line['usd']:.4f}",
        )
        for line in result["artifacts"]
    ]
    columns = ("id", "name", "label", "version", "made (UTC)", "MiB", "device s", "USD")
    return make_table("Artifacts", columns, rows)


def _up(store: Store, artifact: Artifact, role: str = "") -> dict[str, Any]:
    parents = []
    for parent_role, parent_id in artifact.manifest.parents.items():
        found = store.find(parent_id)
        parents.append(
            _up(store, found, parent_role)
            if found
            else {"id": parent_id, "role": parent_role, "label": "missing", "parents": []}
        )
    return {
        "id": artifact.id,
        "role": role,
        "label": artifact.manifest.label,
        "parents": parents,
    }


def _down(store: Store, artifact_id: str, role: str = "") -> dict[str, Any]:
    row = store.index.find(artifact_id)
    children = [
        _down(store, child_id, child_role)
        for child_role, child_id in store.index.children(artifact_id)
    ]
    label = row.label if row else "missing"
    return {"id": artifact_id, "role": role, "label": label, "children": children}


def _detail(result: dict[str, Any]) -> Any:
    manifest = result["manifest"]
    facts = Table.grid(padding=(0, 2))
    for key, value in (
        ("id", manifest["id"]),
        ("recipe", f"{manifest['name']} · {manifest['label']}"),
        ("made", manifest["created_at"]),
        ("folder", result["folder"]),
        ("cost", _cost(manifest["cost"])),
        ("files", _files(manifest["files"])),
        *([("verdict", result["verdict"])] if result["verdict"] else []),
    ):
        facts.add_row(f"[bold]{key}[/bold]", value)
    metrics = make_table(
        "Metrics",
        ("metric", "value"),
        [(key, _short(value)) for key, value in manifest["metrics"].items()],
    )
    up = _tree("Made from", result["up"], "parents")
    down = _tree("Used by", result["down"], "children")
    return Group(facts, "", metrics, "", up, "", down)


def _verdict(store: Store, artifact: Artifact) -> str | None:
    """Of a compressed checkpoint: whether it may be used, and why not."""
    if "scheme" not in artifact.manifest.metrics or artifact.manifest.kind != "checkpoint":
        return None
    found = recorded_verdict(store, artifact.id)
    return ": ".join([found.state, *found.reasons[:1]]) if found else "unverified"


def _cost(cost: dict[str, Any]) -> str:
    usd = "" if cost["usd"] is None else f", {cost['usd']:.4f} USD"
    return f"{cost['device_seconds']:.1f} device-seconds{usd}"


def _files(files: dict[str, Any]) -> str:
    total = sum(entry["size_bytes"] for entry in files.values())
    return f"{len(files)}, {total / 2**20:.1f} MiB"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 8:
        kinds = Counter(type(item).__name__ for item in value)
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    if isinstance(value, dict) and len(value) > 8:
        return f"{len(value)} entries"
    return str(value)


def _tree(title: str, root: dict[str, Any], branch: str) -> Tree:
    tree = Tree(f"[bold]{title}[/bold]")

    def grow(at: Tree, node: dict[str, Any]) -> None:
        for inner in node[branch]:
            role = f"{inner['role']}: " if inner["role"] else ""
            grow(at.add(f"{role}{inner['id']} ({inner['label']})"), inner)

    grow(tree, root)
    return tree
