"""How far two next-token distributions are apart, from the likeliest tokens of each.

The engine tells the probabilities of the K likeliest tokens. Tokens that both models name are
compared one by one, all others as one: the divergence of such a coarser distribution is never
above that of the whole one, and near it when the tokens named hold most of the probability.

Shape suffixes: T positions, K candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunesmith.evaluate.fidelity.ask import Distributions

_LEAST = 1e-7  # what 32-bit log-probabilities leave uncertain of a rest


def divergence_T(parent: Distributions, child: Distributions) -> npt.NDArray[np.float64]:
    """KL(parent ‖ child) in nats at each learnt position."""
    same_TKK = parent.ids_TK[:, :, None] == child.ids_TK[:, None, :]
    shared_TK = same_TKK.any(axis=2)
    log_p_TK = parent.logprobs_TK.astype(np.float64)
    log_q_TK = (same_TKK * child.logprobs_TK.astype(np.float64)[:, None, :]).sum(axis=2)
    p_TK, q_TK = np.exp(log_p_TK) * shared_TK, np.exp(log_q_TK) * shared_TK
    rest_p_T = np.maximum(1.0 - p_TK.sum(axis=1), _LEAST)
    rest_q_T = np.maximum(1.0 - q_TK.sum(axis=1), _LEAST)
    named_T = (p_TK * (log_p_TK - log_q_TK)).sum(axis=1)
    found: npt.NDArray[np.float64] = named_T + rest_p_T * np.log(rest_p_T / rest_q_T)
    return np.maximum(found, 0.0)


def flipped_T(parent: Distributions, child: Distributions) -> npt.NDArray[np.bool_]:
    """Where the likeliest token is another."""
    found: npt.NDArray[np.bool_] = parent.ids_TK[:, 0] != child.ids_TK[:, 0]
    return found
