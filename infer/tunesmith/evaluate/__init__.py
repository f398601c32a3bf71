"""Quality of each model of a recipe, row by row, in the engine that serves it."""
