"""The libraries that training needs: there, quiet, and set up before any of them makes a tensor."""

from __future__ import annotations

from tunesmith.config.errors import require
from tunesmith.config.schema.train import Train


def load_libraries(train: Train | None) -> None:
    """Import what training takes. Raises MissingExtraError, naming the extra, for what is absent.

    PEFT makes a tensor as it is imported, and torch reads what pages to take at the first one.
    """
    for module in ("torch", "transformers"):
        require(module, "train")
    from tunesmith.train.heap import use_large_pages
    from tunesmith.train.model import quiet_libraries

    use_large_pages()
    quiet_libraries()
    for module in ("accelerate", "peft"):
        require(module, "train")
    if train and (train.method == "qlora" or "8bit" in train.optim):
        require("bitsandbytes", "train")
