"""Loading, saving and hashing a chat template."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat import ChatTemplate
from tunesmith.config.errors import DataError, ModelError

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure."}]


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path, family_chat: Any) -> None:
    chat = family_chat("llama3")
    chat.save(tmp_path)
    again = ChatTemplate.load(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert again.sha256 == chat.sha256
    assert again.supervise(HELLO) == chat.supervise(HELLO)


def test_another_template_replaces_the_model_s_own(
    tmp_path: Path, family_chat: Any, families: Any
) -> None:
    family_chat("chatml").save(tmp_path / "base")
    override = tmp_path / "phi.jinja"
    override.write_text(families["phi4"]["template"].replace("<|im_sep|>", "\n"), encoding="utf-8")
    own, chat = (ChatTemplate.load(tmp_path / "base", each) for each in (None, override))
    assert (
        chat.render(HELLO)
        == "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\nSure.<|im_end|>"
    )
    assert chat.sha256 != own.sha256
    chat.save(tmp_path / "tuned")
    assert ChatTemplate.load(tmp_path / "tuned").sha256 == chat.sha256


def test_hash_covers_the_tokens_that_the_template_names(template_chat: Any) -> None:
    tokens = ("<s>", "</s>", "<|im_end|>")
    named, unnamed = "{{ bos_token }}{{ messages }}", "{{ messages }}"
    first, second = (
        [template_chat(text, tokens, bos, "<|im_end|>").sha256 for text in (named, unnamed)]
        for bos in ("<s>", "</s>")
    )
    assert first[0] != second[0]
    assert first[1] == second[1]


@pytest.mark.parametrize(
    ("name", "token"), [("phi3", "<|end|>"), ("gemma2", "<end_of_turn>"), ("harmony", "<|return|>")]
)
def test_knows_the_token_that_ends_a_turn(name: str, token: str, family_chat: Any) -> None:
    chat = family_chat(name)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id) == token


def test_a_base_without_a_template_is_refused_with_the_way_out(template_chat: Any) -> None:
    with pytest.raises(ModelError, match=r"tests/base has no chat template.*model\.chat_template"):
        template_chat(None)


def test_a_broken_template_is_refused_with_its_line(template_chat: Any) -> None:
    with pytest.raises(ModelError, match="line 2 of the chat template"):
        template_chat("{% for m in messages %}\n{% endif %}")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        ChatTemplate.load(tmp_path)


def test_a_missing_template_file_is_refused(tmp_path: Path, family_chat: Any) -> None:
    family_chat("chatml").save(tmp_path)
    with pytest.raises(ModelError, match=r"model\.chat_template: cannot read"):
        ChatTemplate.load(tmp_path, tmp_path / "none.jinja")


def test_what_a_template_rejects_is_a_fault_of_the_row(family_chat: Any) -> None:
    with pytest.raises(DataError, match="rejects this conversation: Conversation roles must"):
        family_chat("gemma2").render([HELLO[0], HELLO[0]])


def test_importing_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, tunesmith.chat; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
