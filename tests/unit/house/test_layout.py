"""The house: one namespace over four folders, and what must stay light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
STAGES = ("core", "train", "quantize", "infer")


def packages() -> list[Path]:
    return [path for stage in STAGES for path in (ROOT / stage / "tunesmith").iterdir()]


def test_the_namespace_has_no_init_file() -> None:
    assert not [s for s in STAGES if (ROOT / s / "tunesmith" / "__init__.py").exists()]


def test_every_package_is_typed_and_has_an_init_file() -> None:
    folders = [path for path in packages() if path.name != "__pycache__"]
    assert len(folders) >= 15
    for folder in folders:
        assert (folder / "__init__.py").is_file(), folder
        assert (folder / "py.typed").is_file(), folder


def imported_by(*arguments: str) -> set[str]:
    """The modules in memory after a command of the CLI."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['tunesmith', *{arguments!r}]\n"
        "try: runpy.run_module('tunesmith.cli', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('|'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].split("|"))


def test_check_help_and_schema_import_nothing_heavy() -> None:
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    heavy = {"torch", "transformers", "datasets", "vllm", "numpy", "pandas", "bokeh"}
    for arguments in (("--help",), ("check", recipe), ("schema",)):
        loaded = imported_by(*arguments)
        assert "typer" in loaded
        assert not heavy & loaded, arguments
    assert "pydantic" not in imported_by("--help")
