"""The same examples in every run; `pytest --hypothesis-profile=explore` looks for others."""

from hypothesis import settings

settings.register_profile("same", derandomize=True, max_examples=200)
settings.register_profile("explore", max_examples=2000)
settings.load_profile("same")
