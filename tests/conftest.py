"""The same examples in every run; `pytest --hypothesis-profile=explore` looks for others."""

from hypothesis import settings

# Without a deadline: on a machine that others use too, one example may take long.
settings.register_profile("same", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("same")
