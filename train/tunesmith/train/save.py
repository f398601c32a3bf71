"""Finished models as folders that transformers, PEFT and vLLM load as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.train.language import Language


def save_adapter(
    peft_model: Any, language: Language, folder: Path, base_id: str, initial: Path | None = None
) -> None:
    """The adapter in PEFT's layout, with the tokenizer and chat template it was trained with.

    `initial` is the adapter as it was before training, where its beginning was taken out of the
    base: what is saved then is the difference, which belongs on the base as it is.
    """
    for settings in peft_model.peft_config.values():
        # PEFT keeps a set, whose order would differ from run to run.
        if not isinstance(settings.target_modules, str):
            settings.target_modules = sorted(settings.target_modules)
    # With "auto", PEFT asks the hub about the base's vocabulary.
    peft_model.save_pretrained(
        folder,
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(initial) if initial else None,
    )
    (folder / "README.md").unlink(missing_ok=True)
    # A path of this machine means nothing elsewhere; the id is checked by who serves it.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_id}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    language.save(folder)


def save_model(model: Any, language: Language, folder: Path, dtype: torch.dtype) -> None:
    """A whole model in one precision, that stops at the end of a turn."""
    model.to(dtype)
    model.config.use_cache = True
    end = language.end_of_turn_id
    config = model.generation_config
    known = config.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end is not None and end not in ends:
        config.eos_token_id = [end, *ends] if ends else end
    if config.pad_token_id is None:
        config.pad_token_id = language.tokenizer.pad_token_id
    model.save_pretrained(folder)
    language.save(folder)
