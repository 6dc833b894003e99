"""What the host holds while a model is read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from transformers import UMT5Config, UMT5EncoderModel

from crepatrain.families.reading import read_diffusers, read_transformers

MIB = 1 << 20
SHARD = 60

_READ = """
import resource, sys
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel
from crepatrain.families.reading import read_diffusers, read_transformers

def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
path, part, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
read, kind = (read_diffusers, WanTransformer3DModel) if part == "transformer" else (read_transformers, UMT5EncoderModel)
before = most()
model = read(kind, path, part, dtype)
print(most() - before, sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer and a text encoder of more than 300 MiB in fp32, in files of at most 60."""
    root, size = tmp_path_factory.mktemp("sharded"), f"{SHARD}MB"
    transformer = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=128, text_dim=512, freq_dim=256, ffn_dim=4096, num_layers=5
    )
    transformer.save_pretrained(root / "transformer", max_shard_size=size)
    config = UMT5Config(vocab_size=4000, d_model=1024, d_kv=64, d_ff=4096, num_layers=6, num_heads=16)
    UMT5EncoderModel(config).save_pretrained(root / "text_encoder", max_shard_size=size)
    return root


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the most memory that a process held is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_the_host_holds_the_weights_and_two_shards_at_most(checkpoint: Path, part: str, dtype: str):
    assert len(list((checkpoint / part).glob("*.safetensors"))) > 4
    result = subprocess.run(
        [sys.executable, "-c", _READ, str(checkpoint), part, dtype], capture_output=True, text=True, check=True, env=None
    )
    held, weights = map(float, result.stdout.split()[-2:])
    assert weights > (300 if dtype == "float32" else 150)
    assert held <= weights + 2 * SHARD + 20, "20 MiB of modules that are imported on the way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_is_stored(checkpoint: Path, dtype: torch.dtype):
    transformer = read_diffusers(WanTransformer3DModel, str(checkpoint), "transformer", dtype)
    encoder = read_transformers(UMT5EncoderModel, str(checkpoint), "text_encoder", dtype)
    assert not transformer.training
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for model, part in ((transformer, "transformer"), (encoder, "text_encoder")):
        tensors, found = stored(checkpoint / part), model.state_dict()
        assert tensors.keys() <= found.keys()
        assert {found[name].dtype for name in tensors} >= {dtype}
        assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in tensors.items())
