"""Finished models as folders that transformers, PEFT and vLLM load as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.train.language import Language


def save_adapter(peft_model: Any, language: Language, folder: Path) -> None:
    """The adapter in PEFT's layout, with the tokenizer and chat template it was trained with."""
    for config in peft_model.peft_config.values():
        # PEFT keeps a set, whose order would differ from run to run.
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)
    # With "auto", PEFT asks the hub about the base's vocabulary.
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
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
