"""A byte-level BPE tokenizer learned from text, with a chat template, for a model from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"


def learn_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A `transformers` tokenizer of at most `vocab_size` tokens that can spell any byte.

    The end of a turn is the end of a sequence, so that engines stop there; padding is another
    token, so that the end is always learnt. `max_length` is the model's, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=(Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8"),
    )
