"""Upstreams and routes: what a recipe may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import RecipeError, load_recipe

HEAD = "name: bot\nmodel: {base: folder}\nserve:\n"


def serve(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + text)
    return load_recipe(path).serve


def test_what_is_said_is_what_is_served(tmp_path: Path) -> None:
    found = serve(
        tmp_path,
        "  upstreams:\n"
        "    a: {model: base}\n"
        "    b: {url: 'https://x.example/v1', model: m, token_price: "
        "{input_usd_per_million_tokens: 1, output_usd_per_million_tokens: 2}}\n"
        "  routes: {bot: {arms: {a: 3, b: 1}, fallback: [b], shadow: {upstream: a}}}\n",
    )
    assert found.routes["bot"].arms == {"a": 3.0, "b": 1.0}
    assert found.rollout.steps_percent == (1.0, 10.0, 50.0, 100.0)


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("  upstreams: {a: {model: nonsense}}", "upstreams.a", "none of"),
        ("  upstreams: {a: {}}", "upstreams.a", "give a model"),
        ("  upstreams: {a: {url: 'https://x.example'}}", "upstreams.a", "url needs model"),
        ("  upstreams: {a: {model: base, api_key_env: K}}", "upstreams.a", "with url"),
        ("  upstreams: {a: {adapter: x}}", "upstreams.a", "go together"),
        ("  upstreams: {a: {adapter: x, on: b}}", "serve", "no upstream with an engine"),
        ("  model: base\n  upstreams: {a: {model: base}}", "serve", "give one of them"),
        ("  routes: {r: {arms: {a: 1}}}", "serve", "no upstream 'a'"),
        ("  routes: {r: {arms: {}}}", "routes.r", "at least one"),
        ("  routes: {r: {arms: {a: 0}}}", "routes.r.arms.a", "greater than 0"),
        ("  routes: {r: {arm: {a: 1}}}", "routes.r.arm", "did you mean"),
        ("  upstreams: {a: {modle: base}}", "upstreams.a.modle", "did you mean"),
        ("  rollout: {steps_percent: [10, 5, 100]}", "rollout", "rising"),
        ("  rollout: {steps_percent: [10]}", "rollout", "the last is 100"),
    ],
)
def test_what_cannot_be_is_told_at_its_place(
    tmp_path: Path, text: str, where: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        serve(tmp_path, text + "\n")
    said = str(caught.value)
    assert where in said and "recipe.yaml:" in said, said
    assert words in said, said
