"""Documentation that is made from the code is the code's."""

import re
from pathlib import Path

from tunesmith.cli.reference import recipe_reference
from tunesmith.config.load import leaf_keys

ROOT = Path(__file__).parents[3]


def test_the_recipe_reference_is_current_and_complete() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_reference(), "run: python -m tunesmith.cli.reference > docs/recipe.md"
    for key in leaf_keys():
        assert f"| `{key.split('.')[-1]}` |" in page


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(pages) >= 4
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    reasons = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for requirement in {re.split(r"[\[>=<]", text)[0] for group in groups for text in group}:
        assert requirement.removeprefix("types-") in reasons, requirement
