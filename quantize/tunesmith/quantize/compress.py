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
from tunesmith.quantize.passes import Batch, NotAChainError
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.skeleton import Skeleton, decoder_layers
from tunesmith.quantize.stream import Stream, why_whole
from tunesmith.terminal import log, progress_bar, without_library_bars


@dataclass(frozen=True)
class Compressed:
    """What was done to the model."""

    selection: Selection
    warnings: list[str]
    """What llm-compressor warned of, such as layers that fell back to rounding to nearest."""

    seconds: float
    """Wall time of this attempt."""

    whole: str | None
    """Why the whole model was held in memory; None where it went layer by layer."""


def compress(
    parent: Path,
    out: Path,
    method: Method,
    calibration: Calibration | None,
    *,
    dtype: str,
    trust_remote_code: bool,
    scratch: Path,
) -> Compressed:
    """Quantize the model in `parent` and write its weights and config to `out`.

    Layer by layer where that can be done, with what is finished kept in `scratch`; with the whole
    model in memory elsewhere. Raises ModelError when the model cannot be loaded or has nothing to
    quantize, TunesmithError when llm-compressor fails on it.
    """
    log_path = scratch / "quantize.log"
    with _quiet(log_path) as noticed, without_pinning():
        _refuse_quantized(parent)
        started_s = time.monotonic()
        skeleton = Skeleton.of(parent, dtype, trust_remote_code)
        selection = select(skeleton.model, method)
        batches = _batches(calibration.input_ids if calibration else [])
        asked = modifiers(skeleton.model, method, selection)
        try:
            whole = why_whole(skeleton, selection, asked)
            if whole is None:
                try:
                    model = _by_layer(skeleton, asked, batches, scratch, method.name, out)
                except NotAChainError as error:
                    whole = str(error)
            if whole is not None:
                log(f"{method.name}: the whole model is held in memory: {whole}")
                model = _load(parent, dtype, trust_remote_code)
                _oneshot(model, method, selection, batches)
                model.save_pretrained(out, save_compressed=True)
        except TunesmithError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise TunesmithError(
                f"{method.name}: llm-compressor cannot quantize this "
                f"{type(skeleton.model).__name__}: {reason}; its log is in {log_path}"
            ) from error
        done = select(model, method)
        _confirm(model, done)
    return Compressed(done, noticed, round(time.monotonic() - started_s, 3), whole)


def _by_layer(
    skeleton: Skeleton, asked: list[Any], batches: list[Batch], scratch: Path, name: str, out: Path
) -> Any:
    """The skeleton, its modules marked with what was done to them."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationStatus
    from llmcompressor.core import active_session
    from llmcompressor.transformers.compression.compressed_tensors_utils import resave_config

    Stream(skeleton, asked, batches, scratch / "layers", name).run(out)
    model = skeleton.model
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    model.config.save_pretrained(out)
    resave_config(model.config, str(out))
    compressor.update_config(str(out))
    if model.can_generate():
        model.generation_config.save_pretrained(out)
    active_session().lifecycle.recipe.yaml(file_path=str(out / "recipe.yaml"))
    return model


def _load(parent: Path, dtype: str, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            parent, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{parent}: no model can be loaded from it: {error}") from error


def _refuse_quantized(parent: Path) -> None:
    config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{parent}: this model is quantized already, and what that lost cannot be won back; "
            "give the unquantized model as model.base"
        )


def _oneshot(model: Any, method: Method, selection: Selection, batches: list[Batch]) -> None:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    with _layer_bar(model, method.name, passes=2 * len(batches)):
        oneshot(
            model=model,
            # Loading a tokenizer is skipped for a processor that is given; ids need none.
            processor=object(),
            recipe=modifiers(model, method, selection),
            dataset=DataLoader(batches, batch_size=None) if batches else None,
        )


def _batches(examples: list[list[int]]) -> list[Batch]:
    """One conversation per batch: padding would count as activations that serving never sees."""
    import torch

    batches = []
    for ids in examples:
        input_ids_BS = torch.tensor([ids])
        batches.append({"input_ids": input_ids_BS, "attention_mask": torch.ones_like(input_ids_BS)})
    return batches


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
    layers = list(decoder_layers(model).values())
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
        with warnings.catch_warnings(action="ignore"), without_library_bars():
            yield noticed
        logger.remove(file)
        logger.remove(screen)
    finally:
        logging.disable(logging.NOTSET)


def _is_notable(record: Any) -> bool:
    """Figures have a level above warnings; that there is no GPU is no news."""
    return record["level"].name != "METRIC" and "accelerator" not in record["message"]
