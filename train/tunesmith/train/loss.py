"""The loss: cross-entropy of learnt tokens, with logits only where one is predicted.

Letters of shapes: B sequences, S positions, D width, N learnt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from tunesmith.config.errors import ModelError
from tunesmith.train import attention
from tunesmith.train.examples import Example
from tunesmith.train.head import loss_at_frozen_head

_LARGEST_LOGITS = 2**26
"""Elements of one matrix of logits where the head is trained: 256 MiB in float32."""

_FROZEN_LOGITS = 2**20
"""Elements of one where it is frozen, and nothing is computed twice: small enough for caches."""

_ROUND_TOKENS = 16
"""Libraries keep a compiled kernel for each shape that they have seen: with few shapes, few. FP8
products know no others."""

_FEWEST_ROWS = {"cpu": 128, "cuda": 1024}
"""But never fewer rows at a time than keep a device busy."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass: padded on the right, or as documents back to back in one
    row."""

    input_ids_BS: Tensor

    positions_N: Tensor
    """Indices into the flattened B x S from which a learnt token is predicted."""

    targets_N: Tensor

    rows_N: Tensor
    """Which of the sequences each target is of."""

    sequences: int

    bounds: Tensor | None = None
    """Where each document begins, and the end of the last; None when each has a row of its own."""

    longest: int = 0
    """Tokens of the longest sequence."""

    def to(self, device: torch.device) -> Batch:
        """A copy on another device."""
        found = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**found)


def collate(examples: Sequence[Example], as_documents: bool = False, widest: int = 0) -> Batch:
    """Pad to the longest (and on to a round width, up to `widest`), or set the sequences back to
    back (and one of padding after them, up to a round number of tokens).

    No attention mask is needed, because padding stands after all that is learnt and attention is
    causal.
    """
    # The last token of a sequence is only ever a target.
    lengths = np.array([len(example.input_ids) - 1 for example in examples])
    longest, total = int(lengths.max()), int(lengths.sum())
    width = max(longest, min(round_up(longest), widest))
    starts = np.cumsum(lengths) - lengths if as_documents else np.arange(len(lengths)) * width
    ids = np.zeros(round_up(total) if as_documents else len(lengths) * width, dtype=np.int64)
    positions, targets = [], []
    for example, start, length in zip(examples, starts, lengths, strict=True):
        ids[start : start + length] = example.input_ids[:-1]
        learnt = np.flatnonzero(example.learnt[1:])
        positions.append(start + learnt)
        targets.append(example.input_ids[1:][learnt].astype(np.int64))
    rows_N = np.repeat(np.arange(len(targets)), [len(found) for found in targets])
    bounds = np.unique([*starts, total, len(ids)]).astype(np.int32)
    return Batch(
        torch.from_numpy(ids.reshape(1 if as_documents else len(lengths), -1)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(rows_N),
        len(examples),
        torch.from_numpy(bounds) if as_documents else None,
        max(longest, len(ids) - total) if as_documents else longest,
    )


def round_up(tokens: int) -> int:
    """To a number of tokens that kernels are made for."""
    return tokens + -tokens % _ROUND_TOKENS


class TokenLoss(nn.Module):
    """A causal language model that answers with the loss of each learnt token.

    The decoder runs once; the model's own forward then computes the logits, whatever its head does
    (bias, scale, soft cap), for the positions that matter and a bounded number of them at a time.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._given_1ND: Tensor | None = None
        self._output_type: Any = None
        decoder = base.get_decoder()
        if decoder is base:  # Llama 4 goes by the prefix of its multimodal form.
            decoder = base.model
        # In a tuple: as attributes they would be registered, and their weights listed, twice.
        self._parts = base, decoder, decoder.forward
        decoder.forward = self._decode

    def release(self) -> None:
        """Give the model its own forward back, for another loss to take its place."""
        _, decoder, forward = self._parts
        decoder.forward = forward

    def forward(
        self,
        input_ids_BS: Tensor,
        positions_N: Tensor,
        targets_N: Tensor,
        bounds: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor:
        """Loss in nats of each target [N]."""
        hidden_ND = self._hidden(input_ids_BS, positions_N, bounds, longest)
        return self._in_chunks(hidden_ND, targets_N)

    def _in_chunks(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """The loss of each target, with a bounded number of logits at a time."""
        rows = max(1, _LARGEST_LOGITS // self._vocabulary)
        if self._head_is_frozen:
            fewest = _FEWEST_ROWS[hidden_ND.device.type]
            rows = max(fewest, _FROZEN_LOGITS // self._vocabulary)
            if hidden_ND.requires_grad:
                return loss_at_frozen_head(hidden_ND, targets_N, self._nats, rows)
        if len(targets_N) <= rows:
            return self._nats(hidden_ND, targets_N)
        chunks = zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        if not hidden_ND.requires_grad:
            # Into one tensor: small results, each left between the large blocks that a chunk gives
            # back, would keep the C library from using those blocks again.
            nats_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
            for nats, chunk in zip(nats_N.split(rows), chunks, strict=True):
                nats.copy_(self._nats(*chunk))
            return nats_N
        # Logits of one chunk live at a time; the backward pass computes them again.
        return torch.cat([checkpoint(self._nats, *chunk, use_reentrant=False) for chunk in chunks])

    def logits(self, batch: Batch) -> Tensor:
        """Logits in float32 at the positions of a batch."""
        return self._head(
            self._hidden(batch.input_ids_BS, batch.positions_N, batch.bounds, batch.longest)
        )

    def all_logits(self, input_ids_BS: Tensor) -> Tensor:
        """Logits in float32 at every position, as the model computes them by itself."""
        with self._precision(input_ids_BS):
            logits: Tensor = self.model(input_ids=input_ids_BS, use_cache=False).logits
        return logits.float()

    def _nats(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(self._head(hidden_ND), targets_N, reduction="none")

    def _hidden(
        self, input_ids_BS: Tensor, positions_N: Tensor, bounds: Tensor | None, longest: int
    ) -> Tensor:
        """What the head is given at some positions."""
        _, decoder, _ = self._parts
        documents: dict[str, Any] = {}
        if bounds is not None:
            at = torch.arange(input_ids_BS.shape[1], device=bounds.device)
            starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=len(at))
            documents = {
                "position_ids": (at - starts).unsqueeze(0),
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        with self._precision(input_ids_BS):
            hidden_BSD = decoder(input_ids=input_ids_BS, use_cache=False, **documents)[0]
        hidden_ND: Tensor = hidden_BSD.flatten(0, 1).index_select(0, positions_N)
        return hidden_ND

    def _head(self, hidden_ND: Tensor) -> Tensor:
        base, _, _ = self._parts
        self._given_1ND = hidden_ND.unsqueeze(0)
        try:
            with self._precision(hidden_ND):
                logits: Tensor = base(
                    input_ids=hidden_ND.new_zeros((1, 1), dtype=torch.long), use_cache=False
                ).logits
        finally:
            self._given_1ND = None
        return logits[0].float()

    def _decode(self, *arguments: Any, **keywords: Any) -> Any:
        """The decoder's forward, which is skipped while there is something to hand to the head."""
        if self._given_1ND is not None:
            return self._output_type(last_hidden_state=self._given_1ND)
        _, _, forward = self._parts
        output = forward(*arguments, **keywords)
        self._output_type = type(output)
        return output

    @property
    def _vocabulary(self) -> int:
        return int(self._parts[0].get_output_embeddings().weight.shape[0])

    @cached_property
    def _head_is_frozen(self) -> bool:
        """Whether nothing that is trained comes after the decoder.

        Never where FSDP divides the model, which gathers weights for whole backward passes; nor in
        float16, where gradients are too small before they are scaled.
        """
        base, decoder, _ = self._parts
        inside = {id(weight) for weight in decoder.parameters()}
        after = [weight for weight in base.parameters() if id(weight) not in inside]
        after += base.get_output_embeddings().parameters()
        is_divided = any(isinstance(module, FSDPModule) for module in self.modules())
        is_trained = any(weight.requires_grad for weight in after)
        return not (is_divided or is_trained or self._dtype == torch.float16)

    def _precision(self, like: Tensor) -> Any:
        is_reduced = self._dtype != torch.float32
        return torch.autocast(like.device.type, self._dtype, enabled=is_reduced)


@torch.no_grad()
def check_logits(loss: TokenLoss, example: Example, device: torch.device) -> None:
    """Raise ModelError when what the loss relies on does not hold for this model: a logit depends
    on nothing after its position, and on the hidden state of no other position."""
    batch = collate([beginning(example)]).to(device)
    ids_1S = batch.input_ids_BS
    half = max(1, ids_1S.shape[1] // 2)
    was_training = loss.training
    loss.eval()
    try:
        whole_SV = loss.all_logits(ids_1S)[0]
        half_SV = loss.all_logits(ids_1S[:, :half])[0]
        chosen_NV = loss.logits(batch)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"the base cannot be run on token ids alone: {error}") from error
    finally:
        loss.train(was_training)
    if not torch.isfinite(whole_SV).all():
        raise ModelError("the base computes logits that are not finite; its weights are damaged")
    name = type(loss.model).__name__
    if _distance(half_SV, whole_SV[:half]) > _MOST_ROUNDING:
        raise ModelError(
            f"{name} looks at later tokens; only causal language models can be trained"
        )
    if _distance(chosen_NV, whole_SV.index_select(0, batch.positions_N)) > _MOST_ROUNDING:
        raise ModelError(f"{name}: its logits depend on other positions too; it cannot be trained")


@torch.no_grad()
def keep_documents_apart(
    loss: TokenLoss, examples: Sequence[Example], device: torch.device
) -> str | None:
    """Have the model attend inside documents that stand back to back, and prove that it does.

    Two of the examples give the logits together that they give alone, and those of one stay the
    same to the bit when the other is changed. Returns why not, and then changes nothing.
    """
    first = examples[0]
    second = next((row for row in examples if len(row.input_ids) != len(first.input_ids)), first)
    changed = Example((first.input_ids + 1) % int(first.input_ids.max() + 1), first.learnt)
    was_training = loss.training
    loss.eval()
    before = loss.model.config.get_text_config()._attn_implementation
    alone_NV = torch.cat([loss.logits(collate([row]).to(device)) for row in (first, second)])
    fault = attention.use(loss.model)
    if fault is None:
        try:
            together_NV, others_NV = (
                loss.logits(collate([row, second], as_documents=True).to(device))
                for row in (first, changed)
            )
            count = int(second.learnt.sum())
            if not torch.equal(together_NV[-count:], others_NV[-count:]):
                fault = "a document's logits change with the document before it"
            elif _distance(together_NV, alone_NV) > _MOST_ROUNDING:
                fault = "documents have other logits together than alone"
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            fault = str(error).strip().partition("\n")[0]
        if fault:
            loss.model.set_attn_implementation(before)
    loss.train(was_training)
    return fault


def beginning(example: Example) -> Example:
    """As many tokens of a sequence as its check looks at, all of them learnt: all logits of a long
    one can take more memory than the training."""
    ids = example.input_ids[:_CHECKED_TOKENS]
    return Example(ids, np.arange(len(ids)) > 0)


_CHECKED_TOKENS = 129

_MOST_ROUNDING = 0.1
"""Largest relative difference between two ways to compute the same logits in low precision."""


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm().clamp(min=1e-6))
