"""Artifacts, their lineage, versions and aliases."""

from tunesmith.ledger.database import open_database
from tunesmith.ledger.delivery import deliver
from tunesmith.ledger.environment import (
    describe_environment,
    device_count,
    gpu_capability,
    gpu_names,
)
from tunesmith.ledger.index import Index, Row
from tunesmith.ledger.manifest import Artifact, Cost, Draft, Kind, Manifest, hash_file
from tunesmith.ledger.store import Store, Work

__all__ = [
    "Artifact",
    "Cost",
    "Draft",
    "Index",
    "Kind",
    "Manifest",
    "Row",
    "Store",
    "Work",
    "deliver",
    "describe_environment",
    "device_count",
    "gpu_capability",
    "gpu_names",
    "hash_file",
    "open_database",
]
