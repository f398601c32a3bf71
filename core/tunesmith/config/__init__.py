"""The recipe: schema, loading, and the errors a person can meet. Imports neither torch nor vLLM."""

from tunesmith.config.errors import (
    DataError,
    GateError,
    MissingExtraError,
    ModelError,
    RecipeError,
    TunesmithError,
    UnknownArtifactError,
    UserError,
    WorkInterrupted,
    require,
)
from tunesmith.config.load import dump_recipe, load_recipe
from tunesmith.config.schema import Recipe

__all__ = [
    "DataError",
    "GateError",
    "MissingExtraError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "TunesmithError",
    "UnknownArtifactError",
    "UserError",
    "WorkInterrupted",
    "dump_recipe",
    "load_recipe",
    "require",
]
