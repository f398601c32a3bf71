"""Peak memory of a training, from the model's configuration alone.

The training's own code runs on FakeTensors (torch._subclasses.fake_tensor), which have shapes,
types and storages but no contents: the check of the logits, evaluations and optimizer steps take
seconds and no memory, whatever the architecture, adapter, precision or optimizer. What is alive is
counted as storages come and go.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tunesmith.config.schema.train import Train
from tunesmith.train.loss import Batch, TokenLoss
from tunesmith.train.optimizer import make_optimizer

Parts = dict[str, int]
"""Part → bytes."""

_EIGHT_BIT_COPIES = 5
"""float32 matrices beside a float32 weight while bitsandbytes' 8-bit AdamW updates it on a CPU:
both states, the scaled gradient, and a root with what is made of it."""


@dataclass(frozen=True)
class Pass:
    """The size of one forward pass."""

    rows: int

    width: int
    """Places for tokens in each of them."""

    targets: int
    """Learnt tokens."""

    def batch(self) -> Batch:
        """A batch of this size."""
        targets_N = torch.zeros(self.targets, dtype=torch.int64)
        ids_BS = torch.zeros((self.rows, self.width), dtype=torch.int64)
        return Batch(ids_BS, targets_N, targets_N, targets_N, self.rows, None, self.width)


@dataclass(frozen=True)
class Workload:
    """What a training does, as far as its memory goes."""

    train: tuple[Pass, ...]
    """Passes, with the largest among them."""

    evaluation: tuple[Pass, ...]

    first: Pass
    """The row on which the model is checked."""

    accumulates: bool
    """Whether a step has several passes."""


def simulate(model: Any, train: Train, dtype: torch.dtype, work: Workload) -> Parts:
    """Bytes by part at the moment when all of a training's tensors together are largest.

    `model` is on the meta device, with its adapter; it is used up.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    meter = _Meter(model.get_output_embeddings().weight.shape[0])
    if train.optim == "paged_adamw_8bit":
        train = train.model_copy(update={"optim": "adamw_8bit"})
    with torch.random.fork_rng(devices=[]):
        with fake:
            _give_storages(model, dtype)
        for tensor in [*model.parameters(), *model.buffers()]:
            is_adapter = tensor.requires_grad and train.method in ("lora", "qlora")
            meter.add(tensor, "adapters" if is_adapter else "weights")
            if state := getattr(tensor, "quant_state", None):
                meter.add(state.absmax, "weights")
                meter.add(state.state2.absmax, "weights")
        loss = TokenLoss(model, dtype)
        # bitsandbytes computes its tables of 8-bit values, which takes numbers.
        optimizer = make_optimizer(loss, train, torch.device("cpu"))
        with fake, meter, _sequences_unpacked():
            _run(loss, optimizer, work, meter)
    return meter.peak


@contextmanager
def _sequences_unpacked() -> Iterator[None]:
    """transformers looks at the positions for several sequences in a row, finds none in a training,
    and leaves the mask out; where there is nothing to look at it would make one."""
    from transformers import masking_utils

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _positions: None):
        yield


def _run(loss: TokenLoss, optimizer: Any, work: Workload, meter: _Meter) -> None:
    """What the training does, once."""
    for weight in loss.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(
                lambda found: meter.move(found.grad, "gradients")
            )
    loss.eval()
    with torch.no_grad():
        batch = work.first.batch()
        half = max(1, work.first.width // 2)
        whole_SV = loss.all_logits(batch.input_ids_BS)[0]
        half_SV = loss.all_logits(batch.input_ids_BS[:, :half])[0]
        chosen_NV = loss.logits(batch)
        (chosen_NV - whole_SV.index_select(0, batch.positions_N)).norm()
        del whole_SV, half_SV, chosen_NV
    _evaluate(loss, work)
    loss.train()
    small = Pass(1, 2, 1)
    _loss(loss, small).backward()
    with meter.making("optimizer"):
        optimizer.step()
    optimizer.zero_grad()
    for one in work.train:
        if work.accumulates:
            _loss(loss, small).backward()
        _loss(loss, one).backward()
        optimizer.step()
        optimizer.zero_grad()
    _evaluate(loss, work)


def _evaluate(loss: TokenLoss, work: Workload) -> None:
    loss.eval()
    with torch.no_grad():
        for one in work.evaluation:
            _loss(loss, one)


def _loss(loss: TokenLoss, size: Pass) -> Tensor:
    batch = size.batch()
    nats_N: Tensor = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N)
    return nats_N.sum()


class _Meter(TorchDispatchMode):
    """Counts the bytes of all live tensors, by part."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.peak: Parts = {}
        self._vocabulary = vocabulary
        self._part = "activations"
        self._sizes: dict[int, tuple[str, int]] = {}
        self._live: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
                is_logits &= self._part == "activations"
                self.add(tensor, "logits" if is_logits else self._part)
        if inside := _workspace_bytes(str(func), args):
            self._live[self._part] += inside
            self._note()
            self._live[self._part] -= inside
        return out

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """All that is made meanwhile belongs to this part."""
        before, self._part = self._part, part
        yield
        self._part = before

    def add(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = part, storage.nbytes()
            self._live[part] += storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            self._note()

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor as another part from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._sizes[key]
        self._live[before] -= size
        self._live[part] += size
        self._sizes[key] = part, size

    def _drop(self, key: int) -> None:
        part, size = self._sizes.pop(key)
        self._live[part] -= size

    def _note(self) -> None:
        if sum(self._live.values()) > sum(self.peak.values()):
            self.peak = dict(self._live)


def _workspace_bytes(operation: str, args: tuple[Any, ...]) -> int:
    """What bitsandbytes' operations allocate inside, where no mode can see it."""
    if operation.startswith("bitsandbytes.gemm_4bit"):
        return int(math.prod(args[2]) * args[0].element_size())
    if operation.startswith("bitsandbytes.optimizer_update_8bit"):
        return _EIGHT_BIT_COPIES * 4 * int(args[1].numel())
    return 0


def _give_storages(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every meta tensor by a FakeTensor, and one that is shared by a shared one."""
    made: dict[int, tuple[Any, nn.Parameter]] = {}
    for module in list(model.modules()):
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:
                is_packed = type(weight).__name__ == "Params4bit"
                made[id(weight)] = (
                    weight,
                    _packed(module, dtype)
                    if is_packed
                    else nn.Parameter(
                        torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad
                    ),
                )
            module._parameters[name] = made[id(weight)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _packed(module: Any, dtype: torch.dtype) -> nn.Parameter:
    """The weight of a 4-bit layer as bitsandbytes packs it, with doubly quantized scales."""
    from bitsandbytes.functional import QuantState

    count = module.in_features * module.out_features
    scales = -(-count // 64)
    weight: Any = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), False)
    weight.quant_state = module.quant_state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=QuantState(
            absmax=torch.empty(-(-scales // 256)),
            code=torch.empty(256),
            blocksize=256,
            dtype=torch.float32,
        ),
    )
    packed: nn.Parameter = weight
    return packed
