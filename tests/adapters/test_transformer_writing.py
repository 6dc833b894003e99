"""A whole transformer, written as the result of a run."""

from pathlib import Path

import pytest
import torch
from common import disk_of, tiny_family
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from crepatrain.adapters.writing import write_transformer
from crepatrain.errors import UserError


@pytest.fixture
def transformer(wan: Path) -> WanTransformer3DModel:
    return tiny_family().load_transformer(str(wan), torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_is_written_as_a_pipeline_has_it(transformer, wan, tmp_path, dtype):
    folder = tmp_path / "run" / "transformer"
    write_transformer(folder, transformer, dtype)
    assert sorted(contents(folder)) == sorted([*contents(wan / "transformer"), "manifest.json"])
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    loaded = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
    assert transformer.dtype == torch.float32, "what is trained stays as it is"
    assert [path.name for path in folder.parent.iterdir()] == ["transformer"]


def test_a_transformer_takes_the_place_of_the_one_before(transformer, tmp_path):
    folder = tmp_path / "transformer"
    write_transformer(folder, transformer, torch.float32)
    before = contents(folder)
    for left in ("transformer.tmp", "transformer.old"):  # of a kill
        (tmp_path / left).mkdir()
        (tmp_path / left / "junk").write_bytes(b"half")
    with torch.no_grad():
        transformer.proj_out.weight.add_(1)
    write_transformer(folder, transformer, torch.float32)
    assert contents(folder).keys() == before.keys()
    assert contents(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_a_full_disk_is_reported_and_leaves_the_one_before(transformer, tmp_path):
    folder = tmp_path / "transformer"
    write_transformer(folder, transformer, torch.float32)
    before = contents(folder)
    with disk_of(16_384), pytest.raises(UserError) as error:
        write_transformer(folder, transformer, torch.float32)
    assert str(folder) in str(error.value)
    assert "free disk space" in str(error.value)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"], "half a file would fill the disk further"
