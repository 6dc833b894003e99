"""Safetensors files that are written tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from crepatrain.memory.account import StorageAccount
from crepatrain.training.tensor_files import _NAMES, write_tensors


@pytest.mark.parametrize("dtype", _NAMES)
def test_every_data_type_is_read_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype):
    content = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    tensor = (content % 2).bool()[:24].view(4, 6) if dtype == torch.bool else content.view(dtype).view(4, 6)
    tensors = {"all": tensor, "one": tensor[0, 0], "none": tensor[:0], "turned": tensor.t(), "ü": torch.ones(3)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert (
            found[name].contiguous().view(-1).view(torch.uint8).tolist() == value.contiguous().view(-1).view(torch.uint8).tolist()
        )
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_tensors_make_equal_files_in_any_order(tmp_path: Path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16), "c": torch.ones((), dtype=torch.int64)}
    write_tensors(tmp_path / "one", tensors, {})
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_one_tensor_at_a_time_is_changed_and_cast(tmp_path: Path):
    tensors = {f"t{n}": torch.full((64, 64), float(n)) for n in range(20)}
    with StorageAccount() as account:
        for tensor in tensors.values():
            tensor.detach()  # the account has then seen what is there already
        account.begin()
        write_tensors(tmp_path / "a", tensors, {}, dtype=torch.bfloat16, change=lambda _, tensor: tensor * 2)
    one = tensors["t0"].nbytes
    cpu = account.on(torch.device("cpu"))
    # What was changed and its cast, and the cast of the tensor before until it is replaced.
    assert 0 < cpu.peak - len(tensors) * one <= 2 * one
    found = load_file(tmp_path / "a")
    assert all(torch.equal(found[name], (2 * tensor).bfloat16()) for name, tensor in tensors.items())
