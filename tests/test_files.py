"""Files as they lie on the disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crepatrain.files import safetensors_header


def with_header(path: Path, header: Any, content: bytes = bytes(4)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def test_the_header_of_a_whole_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path, metadata={"made": "here"})
    header = safetensors_header(path)
    assert header is not None
    assert header["__metadata__"] == {"made": "here"}
    assert (header["a"]["shape"], header["b"]["shape"]) == ([3], [2, 2])
    path.write_bytes(path.read_bytes()[:-1])
    assert safetensors_header(path) is None


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        [1],
        5,
        "text",
        {"a": None},
        {"a": 5},
        {"a": {}},
        {"a": {"data_offsets": 4}},
        {"a": {"data_offsets": []}},
        {"a": {"data_offsets": [0, "4"]}},
        {"a": {"data_offsets": [0, 5]}},
    ],
    ids=str,
)
def test_another_header_is_none(tmp_path, header):
    assert safetensors_header(with_header(tmp_path / "a.safetensors", {"a": {"data_offsets": [0, 4]}})) is not None
    assert safetensors_header(with_header(tmp_path / "a.safetensors", header)) is None


@pytest.mark.parametrize("content", [b"", b"abc", bytes(8), b"\xff" * 20, (2).to_bytes(8, "little") + b"{]..."])
def test_a_file_of_something_else_has_no_header(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert safetensors_header(tmp_path / "a.safetensors") is None
    assert safetensors_header(tmp_path) is None
    assert safetensors_header(tmp_path / "gone") is None
