"""Random sequences of different lengths, of which some tokens are learnt."""

import numpy as np

from tunesmith.train.examples import Example


def make_examples(count: int) -> list[Example]:
    """The same ones in every process."""
    random = np.random.default_rng(0)
    found = []
    for length in random.integers(12, 90, count):
        learnt = random.random(length) < 0.3
        learnt[0], learnt[-1] = False, True
        found.append(Example(random.integers(0, 512, length).astype(np.int32), learnt))
    return found
