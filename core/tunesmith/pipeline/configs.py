"""Configuration and tokenizer of a base, before its weights are needed."""

from __future__ import annotations

from pathlib import Path

from tunesmith.config import require
from tunesmith.pipeline.stages import Stages

_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]


def config_folder(stages: Stages) -> Path | None:
    """Configuration and tokenizer of the base, without its weights; None while it is not made."""
    if found := stages.store.find(stages.base.id):
        return found.root
    if stages.builds_base:
        return None
    section = stages.base.section
    if section["source"] == "folder":
        return Path(str(stages.recipe.model.base))
    hub = require("huggingface_hub", "train")
    return Path(
        hub.snapshot_download(
            section["source"], revision=section["commit"], allow_patterns=_CONFIG_FILES
        )
    )
