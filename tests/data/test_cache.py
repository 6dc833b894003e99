"""The store of everything that is computed once."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crepatrain.data.cache import CacheStore, entry_key, pack_features, unpack_features
from crepatrain.errors import UserError

FACTS = {
    "kind": "teacher",
    "file": "abc",
    "frames": [0, 4, 8],
    "size": [64, 96],
    "crop": "centre",
    "encoder": "def",
    "input": (56, 84),
    "computed": "torch.float32",
    "stored": "float16",
}


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return CacheStore(tmp_path / "cache")


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_an_entry_comes_back_to_the_bit(store: CacheStore):
    tensors = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(2).bfloat16(),
        "turned": torch.randn(4, 5).t(),
        "part": torch.randn(9)[::2],
    }
    key = entry_key(**FACTS)
    assert not store.path("teacher", key).exists()
    store.write("teacher", key, tensors)
    assert store.path("teacher", key).exists()
    back = store.read("teacher", key)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_nothing_but_the_entry_is_left(store: CacheStore):
    store.write("text", "k" * 64, {"x": torch.zeros(2)})
    store.write("text", "k" * 64, {"x": torch.ones(2)})
    assert entries(store.root) == [store.path("text", "k" * 64)]
    assert store.read("text", "k" * 64)["x"].sum() == 2


def test_kinds_are_apart(store: CacheStore):
    store.write("text", "k", {"x": torch.zeros(2)})
    assert not store.path("latents", "k").exists()


def test_a_key_is_stable_whatever_the_order_of_its_facts():
    assert entry_key(**FACTS) == entry_key(**dict(reversed(FACTS.items())))
    assert len(entry_key(**FACTS)) == 64


def test_a_key_changes_with_every_fact():
    changed = {
        "kind": "latents",
        "file": "abd",
        "frames": [0, 4, 9],
        "size": [96, 64],
        "crop": "left",
        "encoder": "deg",
        "input": (56, 98),
        "computed": "torch.bfloat16",
        "stored": "float32",
    }
    keys = [entry_key(**FACTS)] + [entry_key(**(FACTS | {name: value})) for name, value in changed.items()]
    keys.append(entry_key(**(FACTS | {"another": 1})))
    keys += [entry_key(**{other: value for other, value in FACTS.items() if other != name}) for name in FACTS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("harm", ["cut", "empty", "garbage", "gone"])
def test_a_damaged_entry_is_reported_by_name(store: CacheStore, harm: str):
    store.write("latents", "k" * 64, {"latents": torch.randn(100)})
    path = store.path("latents", "k" * 64)
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-10], "empty": b"", "garbage": os.urandom(len(content))}[harm])
    with pytest.raises(UserError) as error:
        store.read("latents", "k" * 64)
    assert str(path) in str(error.value)
    assert "run the same command again" in str(error.value)
    assert not path.exists()


def test_a_disk_that_refuses_is_reported_and_leaves_nothing(store: CacheStore):
    store.write("latents", "before", {"latents": torch.randn(100)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written") as error:
            store.write("latents", "big", {"latents": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cache_dir" in str(error.value)
    assert entries(store.root) == [store.path("latents", "before")]


def test_a_folder_that_is_a_file_is_reported(tmp_path: Path):
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"can't be written"):
        CacheStore(tmp_path / "cache").write("text", "k", {"x": torch.zeros(2)})


WRITER = """
import sys, torch
from pathlib import Path
from crepatrain.data.cache import CacheStore, entry_key
store = CacheStore(Path(sys.argv[1]))
number = 0
while True:
    store.write("latents", entry_key(number=number), {"latents": torch.full((200_000,), float(number))})
    number += 1
"""


def test_a_kill_leaves_no_half_entry(tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for attempt in range(2):
        root = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], env=environment)
        deadline = time.monotonic() + 60
        while len(list(root.rglob("*.safetensors"))) < 5 + 3 * attempt:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = list(root.rglob("*.safetensors"))
        assert len(written) >= 5
        for path in written:
            latents = load_file(path)["latents"]
            assert latents.shape == (200_000,)
            assert (latents == latents[0]).all()


@pytest.mark.parametrize(("dtype", "bound", "bytes_per_value"), [("float16", 2**-11, 2), ("int8", 4e-3, 1)])
def test_features_keep_their_direction(dtype: str, bound: float, bytes_per_value: int):
    values = torch.randn(3, 40, 384, dtype=torch.float64) * torch.logspace(-2, 2, 40, dtype=torch.float64).unsqueeze(1)
    values[0, 0] = 0
    entry = pack_features(values, dtype)
    assert entry["values"].element_size() == bytes_per_value
    again = unpack_features(entry)
    assert again.dtype == torch.float16
    assert not again[0, 0].any()
    other = torch.randn_like(values)
    cosine = torch.nn.functional.cosine_similarity(values, other, dim=-1)
    found = torch.nn.functional.cosine_similarity(again.double(), other, dim=-1)
    assert (cosine - found).abs().max() < bound
