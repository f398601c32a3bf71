"""Texts that are made at once, beside those that vLLM makes token by token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BOTH = """
import random, sys
from types import SimpleNamespace
from tunesmith.engine import prepare_process

prepare_process()
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from tunesmith.engine.detokenize import Detokenizer

def with_spaces():
    # As Llama 2 has it: words begin with a mark, and what has no token is spelled in bytes.
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\\u2581", "a", "b", "\\u2581a", "\\u2581b", "\\u00e9", "\\u2581\\u2581", "."]
    vocabulary = {word: at for at, word in enumerate(words)}
    inside = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inside.decoder = decoders.Sequence([
        decoders.Replace("\\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    return PreTrainedTokenizerFast(tokenizer_object=inside, unk_token="<unk>", eos_token="</s>")

def by_token(tokenizer, prompt_ids, ids, is_stopped):
    request = EngineCoreRequest(
        "", prompt_ids, None, SamplingParams(), None, 0.0, None, None, None)
    made = IncrementalDetokenizer.from_new_request(tokenizer, request)
    for at, one in enumerate(ids, 1):
        made.update([one], is_stopped and at == len(ids))
    return made.get_next_output_text(finished=True, delta=False)

class Slow:
    # As a tokenizer that is not of the library in Rust.
    is_fast = False

    def __init__(self, inside):
        self._inside = inside

    def __getattr__(self, name):
        return getattr(self._inside, name)

    def __len__(self):
        return len(self._inside)

fast = {"bytes": AutoTokenizer.from_pretrained(sys.argv[1]), "spaces": with_spaces()}
for name, tokenizer in (fast | {f"slow {name}": Slow(one) for name, one in fast.items()}).items():
    detokenizer, chance, size = Detokenizer(tokenizer), random.Random(7), len(tokenizer)
    whole = broken = 0
    for count in range(2000):
        # Low ids are single bytes in both, which seldom make characters.
        least, most = (0, min(size, 300)) if count % 2 else (min(259, size - 40), size)
        ids = [chance.randrange(least, most) for _ in range(chance.randrange(24))]
        prompt_ids = [chance.randrange(size) for _ in range(chance.randrange(1, 9))]
        reason = chance.choice(["stop", "length"])
        expected = by_token(tokenizer, prompt_ids, ids, reason == "stop")
        text = detokenizer.text(prompt_ids, SimpleNamespace(token_ids=ids, finish_reason=reason))
        assert text == expected, (name, prompt_ids, ids, reason, text, expected)
        whole += bool(text) and "\\ufffd" not in text
        broken += "\\ufffd" in text
    assert whole > 100 and broken > 100, (name, whole, broken)
print("same")
"""


@pytest.mark.timeout(240)
def test_text_at_once_is_that_of_token_by_token(llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH, str(llama)], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.endswith("same\n"), done.stderr[-3000:]
