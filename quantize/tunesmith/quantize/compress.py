"""The one place that knows llm-compressor: a model in, a compressed-tensors folder out."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import ModelError, TunesmithError, require
from tunesmith.quantize.calibration import Calibration
from tunesmith.quantize.modifiers import modifiers, without_pinning
from tunesmith.quantize.modules import Selection, select
from tunesmith.quantize.schemes import Method
from tunesmith.terminal import log, progress_bar


@dataclass(frozen=True)
class Compressed:
    """What was done to the model."""

    selection: Selection
    warnings: list[str]
    """What llm-compressor warned of, such as layers that fell back to rounding to nearest."""

    seconds: dict[str, float]
    """Wall time of loading the parent, quantizing, and saving."""


def compress(
    parent: Path,
    out: Path,
    method: Method,
    calibration: Calibration | None,
    *,
    dtype: str,
    trust_remote_code: bool,
    log_path: Path,
) -> Compressed:
    """Quantize the model in `parent` and write its weights and config to `out`.

    Raises ModelError when the model cannot be loaded or has nothing to quantize, TunesmithError
    when llm-compressor fails on it.
    """
    with _quiet(log_path) as noticed:
        clock = [time.monotonic()]
        model = _load(parent, dtype, trust_remote_code)
        selection = select(model, method)
        clock.append(time.monotonic())
        try:
            _oneshot(model, method, selection, calibration)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise TunesmithError(
                f"{method.name}: llm-compressor cannot quantize this {type(model).__name__}: "
                f"{reason}; its log is in {log_path}"
            ) from error
        clock.append(time.monotonic())
        done = select(model, method)
        _confirm(model, done)
        model.save_pretrained(out, save_compressed=True)
        clock.append(time.monotonic())
    names = ("load", "quantize", "save")
    seconds = {name: round(clock[at + 1] - clock[at], 3) for at, name in enumerate(names)}
    return Compressed(done, noticed, seconds)


def _load(parent: Path, dtype: str, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{parent}: this model is quantized already, and what that lost cannot be won back; "
            "give the unquantized model as model.base"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            parent, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{parent}: no model can be loaded from it: {error}") from error


def _oneshot(
    model: Any, method: Method, selection: Selection, calibration: Calibration | None
) -> None:
    from llmcompressor import oneshot

    examples = calibration.input_ids if calibration else []
    with _layer_bar(model, method.name, passes=2 * len(examples)), without_pinning():
        oneshot(
            model=model,
            # Loading a tokenizer is skipped for a processor that is given; ids need none.
            processor=object(),
            recipe=modifiers(model, method, selection),
            dataset=_batches(examples) if examples else None,
        )


def _batches(examples: list[list[int]]) -> Any:
    """One conversation per batch: padding would count as activations that serving never sees."""
    import torch
    from torch.utils.data import DataLoader

    batches = []
    for ids in examples:
        input_ids_BS = torch.tensor([ids])
        batches.append({"input_ids": input_ids_BS, "attention_mask": torch.ones_like(input_ids_BS)})
    return DataLoader(batches, batch_size=None)


def _confirm(model: Any, selection: Selection) -> None:
    """The lists must say what llm-compressor really did."""
    touched = {
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "quantization_scheme", None), "weights", None)
    }
    if wrong := touched ^ selection.quantized.keys():
        raise TunesmithError(
            f"llm-compressor did not quantize what was asked; differing: {sorted(wrong)[:5]}"
        )


@contextmanager
def _layer_bar(model: Any, description: str, passes: int) -> Iterator[None]:
    """Count each pass of a calibration example through a decoder layer."""
    from torch import nn

    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    with progress_bar(description, passes * len(layers) or None) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.advance()) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _quiet(log_path: Path) -> Iterator[list[str]]:
    """Send what the libraries say to a file; yields the list that their warnings are added to."""
    # llm-compressor reads its level while it is imported, and would print to stdout.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    noticed: list[str] = []

    def notice(message: Any) -> None:
        text = message.record["message"]
        if text not in noticed:
            noticed.append(text)
            log(f"llm-compressor: {text}")

    logging.disable(logging.WARNING)
    try:
        require("llmcompressor", "quantize")
        from llmcompressor.logger import logger

        file = logger.add(log_path, level="DEBUG")
        screen = logger.add(notice, level="WARNING", filter=_is_notable)
        with warnings.catch_warnings(action="ignore"), _without_bars():
            yield noticed
        logger.remove(file)
        logger.remove(screen)
    finally:
        logging.disable(logging.NOTSET)


def _is_notable(record: Any) -> bool:
    """Figures have a level above warnings; that there is no GPU is no news."""
    return record["level"].name != "METRIC" and "accelerator" not in record["message"]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Mute the bars of the libraries, which would break ours."""
    tqdm = require("tqdm", "quantize").tqdm
    make = tqdm.__init__

    def make_muted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs | {"disable": True})

    tqdm.__init__ = make_muted
    try:
        yield
    finally:
        tqdm.__init__ = make
