"""Models larger than memory: llm-compressor's modifiers, applied to one decoder layer at a time.

A layer comes from the parent's files, is calibrated with the states that the layers before it
leave, quantized, and written; then its memory is free again. What is written stays: after a kill
the same work goes on with the first layer that is not there. The results are those of
llm-compressor's own pipelines, bit by bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tunesmith.ledger import describe_environment
from tunesmith.ledger.durable import write_synced
from tunesmith.quantize.activations import Activations
from tunesmith.quantize.modules import Selection
from tunesmith.quantize.passes import Batch, Passes
from tunesmith.quantize.skeleton import Skeleton
from tunesmith.quantize.weights import join, write_part
from tunesmith.terminal import Bar, log, progress_bar

_SMOOTHING = frozenset({"SmoothQuantModifier", "AWQModifier"})
_WITHIN_A_LAYER = _SMOOTHING | {"GPTQModifier", "QuantizationModifier"}
"""Modifiers that look at no more than one layer at a time."""

_REST_BYTES = 2**28
_DECIDING = ("torch", "transformers", "llmcompressor", "compressed-tensors")


def _has_windows(config: Any) -> bool:
    """Whether a layer sees only the tokens near it; of Mistral it is taken for granted."""
    if kinds := getattr(config, "layer_types", None):
        return "sliding_attention" in kinds or config.model_type == "mistral"
    return config.model_type == "mistral" or getattr(config, "sliding_window", None) is not None


def why_whole(skeleton: Skeleton, selection: Selection, modifiers: Sequence[Any]) -> str | None:
    """Why this work needs the whole model in memory; None when it can go layer by layer."""
    from compressed_tensors.registry import standardize_lookup_name
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
    from llmcompressor.modeling.offset_norm import NormCalibrationModule

    names = [type(modifier).__name__ for modifier in modifiers]
    if wide := [name for name in names if name not in _WITHIN_A_LAYER]:
        return f"{wide[0]} works on the whole model"
    within = tuple(f"{name}." for name in skeleton.layers)
    if outside := [name for name in selection.quantized if not name.startswith(within)]:
        return f"{outside[0]} is outside the decoder layers"
    if difference := skeleton.differs():
        return difference
    if _has_windows(skeleton.model.config):
        return "its attention has a sliding window, whose masks are not proven layer by layer"
    if get_non_linearized_moes(skeleton.model):
        return "its experts are stored as one tensor"
    found = {standardize_lookup_name(type(module).__name__) for module in skeleton.model.modules()}
    offset = {
        *NormCalibrationModule.registered_names(),
        *NormCalibrationModule.registered_aliases(),
    }
    if found & offset and _SMOOTHING.intersection(names):
        return "the offset of its norms must be taken out before smoothing"
    return None


class Stream:
    """One quantization, layer by layer, in a folder that outlives a kill."""

    def __init__(
        self,
        skeleton: Skeleton,
        modifiers: Sequence[Any],
        batches: Sequence[Batch],
        folder: Path,
        description: str,
    ) -> None:
        from llmcompressor.utils.dev import get_main_device

        self._skeleton, self._modifiers, self._batches = skeleton, list(modifiers), batches
        self._names, self._layers = list(skeleton.layers), list(skeleton.layers.values())
        self._passes = Passes(skeleton.model, self._layers)
        self._folder, self._description = folder, description
        self._device = get_main_device()
        self._fitted = [at for at, m in enumerate(modifiers) if m.requires_calibration_data]

    def run(self, out: Path) -> None:
        """Quantize every layer that is not there yet, and deliver the weights to `out`."""
        from llmcompressor.core import active_session
        from llmcompressor.core.events import EventType
        from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

        self._begin()
        session, model = active_session(), self._skeleton.model
        session.reset()
        done = sum(self._part(at).exists() for at in range(len(self._layers)))
        with ExitStack() as stack:
            stack.enter_context(calibration_forward_context(model))
            self._skeleton.move_buffers(self._device)
            if self._fitted and not done:
                self._embed()
            elif self._fitted and done < len(self._layers):
                states = self._states(self._fitted[0], done).read(self._device)
                self._passes.learn(next(states), self._on_device(self._batches[0]))
            session.initialize(
                model=model, start=-1, recipe=self._modifiers, calib_data=self._batches
            )
            session.state.loss_masks, session.state.sequential_prefetch = None, False
            self._modifiers = session.lifecycle.recipe.modifiers
            self._tell(EventType.CALIBRATION_START, *self._modifiers)
            stack.enter_context(DisableQuantization(model))
            self._recall(done)
            passes = 2 * len(self._fitted) * len(self._batches) or 1
            with progress_bar(self._description, passes * (len(self._layers) - done)) as bar:
                for at in range(done, len(self._layers)):
                    self._quantize(at, bar)
        self._tell(EventType.CALIBRATION_END, *self._modifiers)
        session.finalize()
        join([*map(self._part, range(len(self._layers))), *self._rest()], out)

    def _begin(self) -> None:
        """Drop what an earlier attempt left if this one would come to another result."""
        versions = describe_environment()["versions"]
        texts = hashlib.sha256()
        for batch in self._batches:
            for name, tensor in sorted(batch.items()):
                texts.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        stamp = json.dumps(
            {
                "versions": {name: versions.get(name) for name in _DECIDING},
                "device": str(self._device),
                "asked": [f"{type(m).__name__}({m.model_dump()})" for m in self._modifiers],
                "texts": texts.hexdigest(),
            }
        )
        path = self._folder / "stamp.json"
        if path.exists() and path.read_text(encoding="utf-8") == stamp:
            return
        if path.exists():
            log(f"{self._description}: the environment has changed; it begins again")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        write_synced(path, stamp)

    def _embed(self) -> None:
        """Write the states that the first layer is given, once for every modifier that needs
        them."""
        outside = self._skeleton.outside()
        self._skeleton.fill(outside, self._device)
        self._passes.check(self._on_device(self._batches[0]))
        with ExitStack() as stack:
            files = [stack.enter_context(self._states(m, 0).write()) for m in self._fitted]
            for batch in self._batches:
                hidden_BSD = self._passes.first(self._on_device(batch))
                for append in files:
                    append(hidden_BSD)
        self._skeleton.empty(self._skeleton.outside())

    def _quantize(self, at: int, bar: Bar) -> None:
        """Take one layer through every modifier, write it, and free it."""
        from compressed_tensors.compressors import compress_module
        from compressed_tensors.quantization.utils import is_module_quantized
        from llmcompressor.core.events import EventType
        from llmcompressor.modifiers.quantization.calibration import freeze_module_quantization

        layer, prefix = self._layers[at], f"{self._names[at]}."
        self._skeleton.fill(self._skeleton.stored(layer, prefix), self._device)
        modules = list(layer.modules())
        for number, modifier in enumerate(self._modifiers):
            if number in self._fitted:
                self._calibrate(at, number, bar)
            self._tell(EventType.SEQUENTIAL_EPOCH_END, modifier, modules=modules)
            if number in self._fitted:
                self._propagate(at, number, bar)
        if not self._fitted:
            bar.advance()
        for module in filter(is_module_quantized, modules):
            freeze_module_quantization(module)
            compress_module(module)
        tensors = self._skeleton.stored(layer, prefix)
        self._note(at)
        write_part(
            self._part(at), {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        )
        self._skeleton.empty(tensors)
        for number in self._fitted:
            self._states(number, at).path.unlink(missing_ok=True)
        _give_pages_back()

    def _calibrate(self, at: int, number: int, bar: Bar) -> None:
        """Show a modifier what its layer is given, with the hooks of no other."""
        from llmcompressor.core import active_session
        from llmcompressor.modifiers.utils.hooks import HooksMixin

        states = self._states(number, at).read(self._device)
        with HooksMixin.disable_hooks(keep=set(self._modifiers[number]._hooks)):
            for index, (batch, hidden_BSD) in enumerate(zip(self._batches, states, strict=True)):
                active_session().state.current_batch_idx = index
                self._passes.run(at, hidden_BSD, self._on_device(batch))
                bar.advance()

    def _propagate(self, at: int, number: int, bar: Bar) -> None:
        """Write what the layer, as the modifier left it, gives to the next one."""
        from llmcompressor.modifiers.utils.hooks import HooksMixin

        last = at + 1 == len(self._layers)
        if last:
            bar.advance(len(self._batches))
            return
        states = self._states(number, at).read(self._device)
        with HooksMixin.disable_hooks(), self._states(number, at + 1).write() as append:
            for batch, hidden_BSD in zip(self._batches, states, strict=True):
                append(self._passes.run(at, hidden_BSD, self._on_device(batch)))
                bar.advance()

    def _rest(self) -> list[Path]:
        """Parts with all that is not in a layer, as the parent has it."""
        parts: list[Path] = []
        group: dict[str, Any] = {}
        size_bytes = 0
        outside = self._skeleton.outside()
        for number, (name, place) in enumerate(outside.items(), start=1):
            size_bytes += place.nbytes
            [(_, tensor)] = self._skeleton.weights.read([name])
            group[name] = tensor.to(place.dtype)
            if size_bytes > _REST_BYTES or number == len(outside):
                parts.append(self._folder / f"rest-{len(parts):05d}.safetensors")
                write_part(parts[-1], group)
                group, size_bytes = {}, 0
        return parts

    def _note(self, at: int) -> None:
        """Keep what a modifier only says at the very end."""
        found = [getattr(m, "_rtn_fallback_module_names", []) for m in self._modifiers]
        counts = [getattr(m, "_num_compressed_modules", 0) for m in self._modifiers]
        write_synced(self._folder / f"layer-{at:05d}.json", json.dumps([found, counts]))

    def _recall(self, done: int) -> None:
        if not done:
            return
        log(f"{self._description}: {done} of {len(self._layers)} layers are there already")
        text = (self._folder / f"layer-{done - 1:05d}.json").read_text(encoding="utf-8")
        for modifier, names, count in zip(self._modifiers, *json.loads(text), strict=True):
            if hasattr(modifier, "_rtn_fallback_module_names"):
                modifier._rtn_fallback_module_names = names
                modifier._num_compressed_modules = count

    def _tell(self, event: Any, *modifiers: Any, **details: Any) -> None:
        from llmcompressor.core import active_session
        from llmcompressor.core.events import Event

        for modifier in modifiers:
            modifier.update_event(state=active_session().state, event=Event(type_=event), **details)

    def _part(self, at: int) -> Path:
        return self._folder / f"layer-{at:05d}.safetensors"

    def _states(self, modifier: int, at: int) -> Activations:
        """What a modifier's copy of the model gives to a layer."""
        path = self._folder / f"states-{modifier}-{at:05d}.bin"
        return Activations(path, [tuple(batch["input_ids"].shape) for batch in self._batches])

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device) for name, tensor in batch.items()}


def _give_pages_back() -> None:
    """Return freed memory to the system: a small object that lives between the blocks of a layer
    would keep the C library from doing so, and the next layer may not fit between them."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc alone has it
        library.malloc_trim(0)
