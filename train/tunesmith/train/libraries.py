"""The libraries that training needs: there, quiet, and set up before any of them makes a tensor."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.config.errors import MissingExtraError, require
from tunesmith.config.schema.train import Train

_FIRST, _NEXT = ("torch", "transformers"), ("accelerate", "peft")


def check_libraries(train: Train | None) -> None:
    """Raise MissingExtraError, naming the extra, for what is absent; nothing is imported."""
    for module in (*_FIRST, *_NEXT, *_for(train)):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # a finder may say so itself
            found = None
        if found is None:
            raise MissingExtraError(module, "train")


def load_libraries(train: Train | None) -> None:
    """Import what training takes. Raises MissingExtraError as `check_libraries` does.

    PEFT makes a tensor as it is imported, and torch reads what pages to take at the first one.
    """
    for module in _FIRST:
        require(module, "train")
    from tunesmith.train.heap import use_large_pages
    from tunesmith.train.model import quiet_libraries

    use_large_pages()
    quiet_libraries()
    for module in (*_NEXT, *_for(train)):
        require(module, "train")


def _for(train: Train | None) -> tuple[str, ...]:
    """What these settings need on top."""
    is_packed = train is not None and (train.method == "qlora" or "8bit" in train.optim)
    return ("bitsandbytes",) if is_packed else ()
