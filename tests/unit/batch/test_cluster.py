"""Who gets what on a cluster, and how a node knows that it has the same model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.batch.cluster import Share, share_of
from tunesmith.batch.replica import check_folders, folder_print
from tunesmith.config import ModelError, UserError


@pytest.mark.parametrize(
    ("nodes", "replicas", "gpus_each", "share"),
    [
        ([{"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}, {"GPU": 3.0}], None, 2, Share(5, 0, 2)),
        ([{"CPU": 8.0}, {"GPU": 4.0}], 1, 4, Share(1, 0, 4)),
        ([{"CPU": 4.0}, {"CPU": 16.0}, {}], None, 1, Share(2, 4, 0)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 3, 1, Share(3, 2, 0)),
    ],
)
def test_engines_take_the_gpus_or_else_a_share_of_each_node(
    nodes: list[dict[str, float]], replicas: int | None, gpus_each: int, share: Share
) -> None:
    assert share_of(nodes, replicas, gpus_each) == share


@pytest.mark.parametrize(
    ("nodes", "replicas", "words"),
    [
        ([{"GPU": 1.0}, {"GPU": 1.0}], None, "room for 0 engines of 2 GPUs each"),
        ([{"GPU": 2.0}], 2, "room for 1 engines of 2 GPUs each, not for 2"),
        ([{"CPU": 1.0}], 2, "room for 1 engines of 1 CPUs each, not for 2"),
        ([{}], None, "room for 0 engines"),
    ],
)
def test_more_than_there_is_room_for_is_refused(
    nodes: list[dict[str, float]], replicas: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        share_of(nodes, replicas, 2)


def test_a_node_without_the_model_or_with_another_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(os.urandom(3 << 20))
    (folder / "config.json").write_text("{}")
    expected = {folder: folder_print(folder)}
    check_folders(expected)
    for offset in (0, weights.stat().st_size - 1):
        before = weights.read_bytes()
        with weights.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([before[offset] ^ 1]))
        with pytest.raises(ModelError, match="has other files on this node"):
            check_folders(expected)
        weights.write_bytes(before)
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ModelError, match="has other files"):
        check_folders(expected)
    with pytest.raises(ModelError, match=r"missing is not on this node.*share"):
        check_folders({tmp_path / "missing": "any"})
