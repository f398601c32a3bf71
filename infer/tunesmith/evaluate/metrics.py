"""How near an answer is to its reference, from kept libraries; each is 0 to 100, higher is better.

chrF compares character n-grams and suits every language; ROUGE-L compares the longest common
subsequence of words.
"""

from __future__ import annotations

import re

from tunesmith.config import require

_WORD = re.compile(r"\w+")


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF2 as sacreBLEU computes it."""
    metric = require("sacrebleu", "infer").metrics.CHRF()
    return float(metric.sentence_score(answer, [reference]).score)


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence over lower-case words of any script."""
    from rapidfuzz.distance import LCSseq

    words, expected = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not words or not expected:
        return 100.0 if words == expected else 0.0
    return 200.0 * LCSseq.similarity(words, expected) / (len(words) + len(expected))


TEXT_METRICS = {"chrf": chrf, "rouge_l": rouge_l}
