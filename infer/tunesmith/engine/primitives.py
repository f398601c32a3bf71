"""Matrix products that oneDNN keeps ready for a CPU engine."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from tunesmith.engine.offline import prepare_process

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# As many as a step with a LoRA adapter has of different sizes: with none at all it takes half as
# long again.
_KEPT = "8"
_KEPT_BY_LAYER = 1


def keep_few_primitives() -> None:
    """Bound the memory of an engine whose steps have ever other numbers of tokens.

    A primitive is for one number of tokens and holds some 100 kB. oneDNN keeps 1,024 of them,
    vLLM 32 for each layer; they come to lie between the tensors of the steps, and the heap grows
    by more than twice their size. To make one takes some 30 µs. Call it before torch is loaded;
    a capacity in the environment stays as it is.
    """
    os.environ.setdefault(_CAPACITY, _KEPT)
    prepare_process()
    from vllm import _custom_ops

    for name in ("create_onednn_mm", "create_onednn_scaled_mm"):
        if create := getattr(_custom_ops, name, None):
            setattr(_custom_ops, name, _keeping_few(create))


def _keeping_few(create: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(create)

    @functools.wraps(create)
    def created(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named)
        given.arguments["primitive_cache_size"] = _KEPT_BY_LAYER
        return create(*given.args, **given.kwargs)

    return created
