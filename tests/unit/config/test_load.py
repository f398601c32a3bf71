"""Recipes: every fault at its line, the nearest key, nothing dropped."""

import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config import Recipe, RecipeError, dump_recipe, load_recipe
from tunesmith.config.load import fields_at, leaf_keys

FULL = """\
name: support-bot
seed: 3
model: {base: some/model, dtype: bfloat16}
data:
  train: tickets.jsonl
  max_length: 1024
train:
  method: qlora
  lora: {r: 8, target_modules: [q_proj, v_proj]}
  learning_rate: 1e-4
quantize: {scheme: [w8a8-int8, w4a16]}
evaluate: {tasks: [chrf]}
batch: {input: in.jsonl, output: out.jsonl}
serve: {port: 9000}
bench: {slo: {ttft_p95_ms: 300}}
price: {gpu_hour_usd: 2.6}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_full_recipe_loads_and_its_resolved_copy_is_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.train is not None and recipe.train.learning_rate == 1e-4
    assert recipe.train.lora.target_modules == ("q_proj", "v_proj")
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("learning_rate", "learnig_rate"), ':10: train.learnig_rate: unknown key; did you'),
        (("seed: 3", "seed: three"), ":2: seed: input should be a valid integer"),
        (("method: qlora", "method: qlra"), ":8: train.method: input should be 'lora', 'qlora'"),
        (("name: support-bot", "name: Support Bot"), ":1: name: string should match pattern"),
        (("port: 9000", "port: 99000"), ":14: serve.port: input should be less than or equal"),
        (("scheme: [w8a8-int8, w4a16]", "scheme: w3a7"), ":11: quantize.scheme: "),
        (("seed: 3", "seed: 3\nseed: 4"), ":3: seed: given twice (first on line 2)"),
        (("name: support-bot\n", ""), "name: required, and not given"),
        (("data:\n  train: tickets.jsonl\n  max_length: 1024\n", ""), "train needs a data section"),
        (("seed: 3", "max_length: 7"), 'unknown key; did you mean "data.max_length"?'),
        (("lora: {r: 8", "lora: {r: 8, lr: [}"), "not valid YAML"),
        (("lora: {r: 8", "lora: {r: 8, init_lora_weights: pissa"), "pissa needs unquantized"),
        (("method:", "packing: true\n  neftune_noise_alpha: 5\n  method:"), "turn packing off"),
        (("method:", "preference: {}\n  method:"), "exactly when data.format is preference"),
    ],
)  # fmt: skip
def test_faults_name_their_line(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in FULL
    path = write(tmp_path, FULL.replace(*change))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "asked", [["serve.model=adapter"], ["evaluate.variants=[adapter]"],
              ["train.merge=false", "quantize=null"]],
)  # fmt: skip
def test_an_adapter_that_vllm_cannot_load_is_refused(tmp_path: Path, asked: list[str]) -> None:
    path = write(tmp_path, FULL)
    load_recipe(path, ["train.lora.use_dora=true"])
    with pytest.raises(RecipeError, match="vLLM cannot serve a DoRA adapter"):
        load_recipe(path, ["train.lora.use_dora=true", *asked])


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, FULL.replace("seed: 3", "sed: 3").replace("port: 9000", "prt: 9000"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert 'did you mean "seed"' in str(caught.value)
    assert 'did you mean "port"' in str(caught.value)


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    recipe = load_recipe(path, ["train.learning_rate=5e-5", "evaluate=null", "store.folder=/x"])
    assert recipe.train is not None and recipe.train.learning_rate == 5e-5
    assert recipe.evaluate is None and recipe.store.folder == Path("/x")
    for wrong, expected in (
        ("train.learning_rat=1", 'did you mean "learning_rate"'),
        ("train.learning_rate=fast", "train.learning_rate: input should be a valid number"),
        ("train.learning_rate", "write it as key=value"),
        ("name.first=x", "name is a value, not a section"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [wrong])
        assert expected in str(caught.value)
        assert f'override "{wrong}"' in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_yaml_words_stay_words(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "name: no\nmodel: {base: on, revision: yes}\n"))
    assert (recipe.name, recipe.model.base, recipe.model.revision) == ("no", "on", "yes")


@given(text=st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except RecipeError as error:
        assert str(path) in str(error)


def one_edit(word: str, random_: random.Random) -> str:
    """A deletion, insertion, substitution or swap of neighbours."""
    letters = string.ascii_lowercase + "_"
    at = random_.randrange(len(word))
    match random_.choice(["delete", "insert", "substitute", "swap"]):
        case "delete":
            return word[:at] + word[at + 1 :]
        case "insert":
            return word[:at] + random_.choice(letters) + word[at:]
        case "substitute":
            return word[:at] + random_.choice(letters) + word[at + 1 :]
        case _:
            return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


def typos() -> list[tuple[str, str]]:
    """(leaf key, misspelt leaf key): three different one-edit typos of every key, seeded."""
    random_ = random.Random(20)
    found = []
    for key in leaf_keys():
        *parents, last = key.split(".")
        taken = set(fields_at(parents))
        for _ in range(3):
            while (wrong := one_edit(last, random_)) in taken or not wrong:
                continue
            taken.add(wrong)
            found.append((key, ".".join([*parents, wrong])))
    return found


def test_every_typo_is_rejected_with_the_right_suggestion(tmp_path: Path) -> None:
    base = yaml.safe_load(FULL)
    base["train"]["architecture"] = None
    right = 0
    cases = typos()
    assert len(cases) == 3 * len(list(leaf_keys())) > 200
    for key, wrong in cases:
        with pytest.raises(RecipeError) as caught:
            load_recipe(write(tmp_path, yaml.safe_dump(base)), [f"{wrong}=1"])
        assert f"{wrong}: unknown key" in str(caught.value), wrong
        line = next(line for line in str(caught.value).splitlines() if f"{wrong}: unknown" in line)
        last = key.split(".")[-1]
        right += f'did you mean "{last}"' in line or f'did you mean "{key}"' in line
    assert right / len(cases) >= 0.95, f"{right} of {len(cases)}"


def test_every_field_has_a_docstring() -> None:
    def check(schema: dict[str, Any]) -> None:
        for name, field in schema.get("properties", {}).items():
            assert field.get("description"), name

    whole = Recipe.model_json_schema()
    check(whole)
    for section in whole["$defs"].values():
        check(section)
