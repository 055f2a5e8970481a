"""Models split over several GGUF files, by the gguf package as by llama.cpp's gguf-split, whole and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_gguf import write_gguf
from tiny_models import save_llama

from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The files of one model, in the order of their numbers."""
    write_gguf(tmp_path / "tiny-Q8_0.gguf", save_llama(tmp_path / "hf"), split=8)
    return sorted(tmp_path.glob("*.gguf"))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as e:
        resolve(str(path))
    return str(e.value)


def test_every_part_of_a_split_model_is_read(parts: list[Path], tmp_path: Path) -> None:
    assert [p.name for p in parts] == [f"tiny-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    split, whole = resolve(str(parts[0])), resolve(write_gguf(tmp_path / "whole.gguf", save_llama(tmp_path / "hf")))
    assert split.name == "tiny"
    assert {t.part for t in GGUFFile(split.path).tensors.values()} == {0, 1, 2}
    weights, expected = open_weights(split, torch.float32), open_weights(whole, torch.float32)
    for name, tensor in save_llama(tmp_path / "hf").state_dict().items():
        shape = tuple(tensor.shape)
        assert torch.equal(weights.take(name, shape), expected.take(name, shape)), name
    weights.finish()


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    assert f"part 2 of 3 is missing: {parts[1]}" in refused(parts[0])


def test_the_first_part_is_the_one_to_name(parts: list[Path]) -> None:
    assert f"part 2 of 3. Name the first part: --model {parts[0]}" in refused(parts[1])


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path]) -> None:
    original = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    assert f"{parts[1]}: not part 2 of {parts[0]}" in refused(parts[0])
    shutil.copy(parts[0], parts[1])
    assert f"{parts[1]}: not part 2 of {parts[0]}" in refused(parts[0])
    parts[1].write_bytes(original[: len(original) // 2])
    assert str(parts[1]) in refused(parts[0])
    parts[1].write_bytes(original)
    parts[0].rename(parts[0].with_name("other.gguf"))
    assert "should end in -00001-of-00003.gguf" in refused(parts[0].with_name("other.gguf"))


def test_a_number_of_parts_is_not_believed(parts: list[Path]) -> None:
    raw = parts[0].read_bytes()
    at = raw.index(b"split.count") + len(b"split.count") + 4
    count = raw[at : at + 2]
    assert count == b"\x03\x00"
    parts[0].write_bytes(raw[:at] + b"\xff\xff" + raw[at + 2 :])
    assert "split.count is 65535" in refused(parts[0])
    at = raw.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(raw[:at] + b"\x07" + raw[at + 1 :])
    assert "split.tensors.count is 7" in refused(parts[0])
