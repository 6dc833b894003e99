"""A digest shows every bit that is another, wherever it is."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from damage import flipped, some_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crepatrain import integrity
from crepatrain.integrity import (
    DIGEST_KEY,
    LISTED_KEY,
    Damaged,
    content_seal,
    expect_listed,
    seal,
    sealed_metadata,
    unsealed,
    write_manifest,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "sealed.safetensors"
    save_file(TENSORS, path, metadata=unsealed({"format": "pt", "title": 'a "cat" \\ \n\x01ü雪', "crepatrain.step": "7"}))
    seal(path)
    return path


def test_a_sealed_file_is_read_as_before(sealed: Path):
    assert sealed_metadata(sealed) is not None
    with safe_open(sealed, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == sealed_metadata(sealed)
    assert metadata["title"] == 'a "cat" \\ \n\x01ü雪'
    assert load_file(sealed).keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(sealed).items())


def test_the_digest_can_be_made_again_from_the_file_alone(sealed: Path):
    metadata = sealed_metadata(sealed)
    assert metadata is not None
    digest = metadata[DIGEST_KEY].removeprefix("blake2b:")
    content = sealed.read_bytes().replace(digest.encode(), b"0" * 64)

    def blake(text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=32).digest()

    assert blake(len(content).to_bytes(8, "little") + blake(content)).hex() == digest


def test_a_bit_anywhere_in_a_sealed_file_counts(sealed: Path):
    assert sealed_metadata(sealed)
    for bit in range(0, sealed.stat().st_size * 8, 3):  # of every byte some, and of every place within a byte
        with flipped(sealed, bit), pytest.raises(Damaged):
            sealed_metadata(sealed)
    assert sealed_metadata(sealed)


def test_a_file_of_another_program_has_no_digest(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {}, {"format": "pt"}):
        save_file(TENSORS, path, metadata=metadata)
        assert sealed_metadata(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="cut off"):
        sealed_metadata(path)
    with pytest.raises(FileNotFoundError):
        sealed_metadata(tmp_path / "gone")


def test_equal_content_makes_equal_files(tmp_path: Path):
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        save_file(TENSORS, path, metadata=unsealed({f"key {n}": str(n) for n in range(20)}))
        seal(path)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1


@pytest.mark.parametrize("piece", [16, 64, 100, 1000])
def test_pieces_of_a_large_file_are_all_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int):
    """Headers longer and shorter than a piece, files that end with one and within one."""
    monkeypatch.setattr(integrity, "_PIECE", piece)
    for size in (0, 1, 15, 16, 17, 63, 64, 65, 200):
        path = tmp_path / f"{size}.safetensors"
        save_file({"a": torch.zeros(size, dtype=torch.uint8)}, path, metadata=unsealed({}))
        seal(path)
        assert sealed_metadata(path)
        for bit in some_bits(path, 40):
            with flipped(path, bit), pytest.raises(Damaged):
                sealed_metadata(path)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(250))
    before = content_seal(plain)
    for bit in some_bits(plain, 40):
        with flipped(plain, bit):
            assert content_seal(plain) != before
    plain.write_bytes(bytes(251))
    assert content_seal(plain) != before


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000003"
    folder.mkdir()
    save_file(TENSORS, folder / "a.safetensors", metadata={LISTED_KEY: "2"})
    (folder / "state.json").write_text('{"step": 3}\n', encoding="utf-8")
    write_manifest(folder)
    return folder


def test_a_bit_anywhere_in_a_folder_counts_the_manifest_included(listed: Path):
    assert expect_listed(listed)
    assert set(json.loads((listed / "manifest.json").read_text())["files"]) == {"a.safetensors", "state.json"}
    for path in sorted(listed.iterdir()):
        for bit in range(0, path.stat().st_size * 8, 3):
            with flipped(path, bit), pytest.raises(Damaged):
                expect_listed(listed)
    assert expect_listed(listed)


def test_a_lost_file_and_a_lost_manifest_are_missed(listed: Path):
    content = (listed / "state.json").read_bytes()
    (listed / "state.json").unlink()
    with pytest.raises(Damaged, match=r"state.json can't be read \(No such file"):
        expect_listed(listed)
    (listed / "state.json").write_bytes(content)
    (listed / "another.txt").write_text("of somebody else")
    assert expect_listed(listed)
    (listed / "manifest.json").unlink()
    with pytest.raises(Damaged, match=r"manifest.json is missing"):
        expect_listed(listed)


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", "null", '{"format": 2}', '{"files": {}}', "[" * 100_000, '{"files": []}'])
def test_another_manifest_is_damage(listed: Path, text: str):
    (listed / "manifest.json").write_text(text)
    with pytest.raises(Damaged, match=r"manifest.json"):
        expect_listed(listed)


def test_a_later_format_is_named(listed: Path):
    path = listed / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(Damaged, match="of format 3, and this version reads 2"):
        expect_listed(listed)


def test_a_folder_without_a_manifest_is_of_an_earlier_version(tmp_path: Path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert not expect_listed(tmp_path)
