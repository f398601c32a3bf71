"""The errors a person can meet, each with the exit code that scripts can rely on.

TunesmithError            1   the work failed
├── UserError             2   the recipe, the arguments or the data are wrong
│   ├── RecipeError           a place in a recipe file, with its line
│   ├── DataError             a row or a column of a data set
│   ├── ModelError            a base that cannot do what the recipe asks
│   ├── MissingExtraError     an optional dependency is not installed
│   └── UnknownArtifactError  an id, a name or an alias that the ledger does not have
├── GateError             3   a check or a gate said no
└── WorkInterrupted      75   stopped on request; the same command resumes
"""

from __future__ import annotations

import importlib
from types import ModuleType


class TunesmithError(Exception):
    """The work failed: the message says what, where, what was allowed and what to do next."""

    exit_code = 1


class UserError(TunesmithError):
    """The recipe, the arguments or the data are wrong; nothing was spent."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be read or breaks the schema, as one line per fault."""


class DataError(UserError):
    """A data set that is missing, empty or malformed, with the place of the first fault."""


class ModelError(UserError):
    """A base model that is missing or cannot do what the recipe asks of it."""


class UnknownArtifactError(UserError):
    """An id, name or alias that is not in the ledger."""


class MissingExtraError(UserError):
    """An optional dependency is missing; the message names the extra that brings it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f'this needs the Python package "{module}", which is not installed; '
            f"install the extra that brings it: pip install 'tunesmith[{extra}]'"
        )


class GateError(TunesmithError):
    """A check or a gate said no."""

    exit_code = 3


class WorkInterrupted(TunesmithError):
    """Stopped on request with everything finished so far kept; the same command resumes."""

    exit_code = 75


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency where it is used, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(module, extra) from error
