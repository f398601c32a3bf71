"""What of a sequence that is longer than the limit is learnt, and so calibrated on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.config.schema.data import Truncation


def kept_part(learnt: NDArray[np.bool_], max_length: int, truncation: Truncation) -> slice:
    """The tokens of a sequence that are trained on; none of one that is too long to be."""
    # Attention is causal: nothing after the last target can change any loss.
    length = learnt_length(learnt)
    if length <= max_length:
        return slice(0, length)
    match truncation:
        case "end":
            return slice(0, learnt_length(learnt[:max_length]))
        case "start":
            return slice(length - max_length, length)
        case _:
            return slice(0, 0)


def learnt_length(learnt: NDArray[np.bool_]) -> int:
    """Where a sequence can end: after its last target."""
    targets = np.flatnonzero(learnt)
    return int(targets[-1]) + 1 if len(targets) else 0
