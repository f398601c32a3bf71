"""Attention inside each of several documents that stand back to back in one row.

Letters of shapes: H heads, G key-value heads, T tokens of all documents, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

NAME = "tunesmith_documents"
"""What transformers knows this attention by."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def use(model: Any) -> str | None:
    """Have a model attend inside documents; returns why it cannot, and then leaves it alone.

    The documents' bounds reach `attend` as the keywords that transformers hands to flash attention.
    """
    from transformers.modeling_utils import AttentionInterface

    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if others:
        return f"its layers of {', '.join(sorted(others))} do not keep documents apart"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    AttentionInterface.register(NAME, attend)
    before = config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, KeyError, AttributeError) as error:
        return f"transformers cannot change its attention ({str(error).splitlines()[0]})"
    if config._attn_implementation != NAME:
        model.set_attn_implementation(before)
        return "transformers cannot change its attention"
    return None


def attend(
    module: Any,
    query_1HTW: Tensor,
    key_1GTW: Tensor,
    value_1GTW: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside documents; one call of a variable-length kernel where the device has
    one, else document after document. Returns [1, T, H, W].

    Without bounds each row of the batch is a document. Raises ValueError on anything that plain
    attention does not do (soft caps, sinks, position biases).
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name)]
    if attention_mask is not None or unknown:
        raise ValueError(f"documents cannot be kept apart with {', '.join(unknown) or 'a mask'}")
    if cu_seq_lens_q is None:
        found_BHTW = _one_by_one(query_1HTW, key_1GTW, value_1GTW, scaling, dropout, sliding_window)
        return found_BHTW.transpose(1, 2), None
    if query_1HTW.is_cuda and query_1HTW.dtype in _FLASH_DTYPES and not dropout:
        assert max_length_q is not None
        found_THW: Any = varlen_attn(
            query_1HTW[0].transpose(0, 1),
            key_1GTW[0].transpose(0, 1),
            value_1GTW[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(sliding_window - 1 if sliding_window else -1, 0),
            enable_gqa=query_1HTW.shape[1] != key_1GTW.shape[1],
        )
        return found_THW.unsqueeze(0), None
    sizes = cu_seq_lens_q.diff().tolist()
    parts = zip(
        *(part.split(sizes, dim=2) for part in (query_1HTW, key_1GTW, value_1GTW)), strict=True
    )
    found = [_one_by_one(q, k, v, scaling, dropout, sliding_window) for q, k, v in parts]
    return torch.cat(found, dim=2).transpose(1, 2), None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Causal attention over the rows of a batch, each of them one document."""
    size = query.shape[2]
    mask = None
    if window and window < size:
        at = torch.arange(size, device=query.device)
        distance = at[:, None] - at[None, :]
        mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
