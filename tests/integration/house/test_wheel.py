"""What is published, outside the repository: the wheel that the source archive builds."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
LOCK = REPOSITORY / "requirements" / "cpu.lock"
IMPORT_ALL = """
import importlib, pkgutil, sys, tunesmith
failed = []
names = [module.name for module in pkgutil.walk_packages(tunesmith.__path__, "tunesmith.",
                                                         onerror=failed.append)]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
        path = sys.modules[name].__file__
        assert path.startswith(sys.prefix), path
assert not failed and len(names) > 80, (failed, len(names))
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and what it requires, without extras."""
    folder = tmp_path_factory.mktemp("published")
    build(REPOSITORY, "sdist", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    build(next((folder / "source").iterdir()), "wheel", folder)
    venv.create(folder / "venv")
    bin_folder = folder / "venv" / "bin"
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet"]
    subprocess.run(
        [*uv, "--python", bin_folder / "python", "--constraint", LOCK, next(folder.glob("*.whl"))],
        check=True,
    )
    return bin_folder


def build(source: Path, target: str, out: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", out],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip


def recipe(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}'
    )
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "wheel",
                "model": {"base": "builtin/tiny-llama"},
                "data": {"train": "rows.jsonl"},
                "train": {"method": "lora"},
            }
        )
    )
    return path


def test_the_command_runs_without_any_extra_and_names_the_one_it_needs(
    clean: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path)
    for command, code, words in [
        ("check", 0, ""),
        ("schema", 0, ""),
        ("train", 2, "pip install 'tunesmith[train]'"),
    ]:
        done = subprocess.run(
            [clean / "tunesmith", command, *([path] if command in ("check", "train") else [])],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr


def test_every_module_is_in_the_wheel_and_can_be_imported(clean: Path, tmp_path: Path) -> None:
    """The extras' packages come from this environment; Tunesmith itself from the wheel."""
    done = subprocess.run(
        [clean / "python", "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    modules = {
        path.relative_to(stage)
        for stage in (REPOSITORY / name for name in ("core", "train", "quantize", "infer"))
        for path in (stage / "tunesmith").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    installed = next((clean.parent / "lib").glob("python*/site-packages"))
    assert not [str(path) for path in modules if not (installed / path).is_file()]
