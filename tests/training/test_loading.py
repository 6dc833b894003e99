"""A damaged part of a checkpoint gives one clear message; an error of the program stays what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import tiny_family
from safetensors.torch import load_file

from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.training.loading import loading

TEXT = ("text_encoder", "tokenizer")
DTYPE = torch.float32


def weights(part: Path) -> Path:
    return next(part.glob("*.safetensors"))


def cut_off(part: Path) -> Path:
    path = weights(part)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def cut_off_in_its_header(part: Path) -> Path:
    path = weights(part)
    path.write_bytes(path.read_bytes()[:40])
    return path


def empty(part: Path) -> Path:
    path = weights(part)
    path.write_bytes(b"")
    return path


def flipped_in_its_header(part: Path) -> Path:
    path = weights(part)
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def without_a_shard(part: Path) -> Path:
    path = weights(part)
    first, second = (path.with_name(f"{path.stem}-0000{number}-of-00002.safetensors") for number in (1, 2))
    names = sorted(load_file(path))
    path.rename(first)
    places = dict.fromkeys(names, first.name) | {names[0]: second.name}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return second


def index_without_a_map(part: Path) -> Path:
    path = weights(part).with_name(f"{weights(part).name}.index.json")
    path.write_text("[]", encoding="utf-8")
    return path


def of_another_class(part: Path) -> Path:
    path = part / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"_class_name": "AutoencoderKL"} if "_class_name" in values else {"model_type": "bert"}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def no_json(part: Path) -> Path:
    (part / "config.json").write_text("{no", encoding="utf-8")
    return part / "config.json"


def a_list(part: Path) -> Path:
    (part / "config.json").write_text("[]", encoding="utf-8")
    return part / "config.json"


def without_a_config(part: Path) -> Path:
    (part / "config.json").unlink()
    return part / "config.json"


def of_other_shapes(part: Path) -> Path:
    path = part / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    key = next(key for key in ("num_attention_heads", "base_dim", "d_model") if key in values)
    path.write_text(json.dumps(values | {key: 2 * values[key]}), encoding="utf-8")
    return part  # seen by the library alone, as it loads


def without_weights(part: Path) -> Path:
    weights(part).unlink()
    return part


DAMAGE = {
    cut_off: "damaged or cut off",
    cut_off_in_its_header: "damaged or cut off",
    empty: "damaged or cut off",
    flipped_in_its_header: "damaged or cut off",
    without_a_shard: "it is missing",
    index_without_a_map: "it has no weight_map",
    of_another_class: "it is that of a .*, and model_index.json names a ",
    no_json: "it is not JSON",
    a_list: "it holds a list",
    without_a_config: "it is missing",
    of_other_shapes: "",
    without_weights: "",
}

LOADERS: dict[str, tuple[tuple[str, ...], Callable[[Family, str], object]]] = {
    "transformer": (("transformer",), lambda family, folder: family.load_transformer(folder, DTYPE)),
    "vae": (("vae",), lambda family, folder: family.load_vae(folder, DTYPE)),
    "text_encoder": (TEXT, lambda family, folder: family.load_text_encoder(folder, DTYPE)),
    "image_encoder": (("image_encoder", "image_processor"), lambda family, folder: family.load_image_encoder(folder, DTYPE)),
}


def load(folder: Path, part: str) -> object:
    parts, loader = LOADERS[part]
    with loading(folder, parts):
        return loader(tiny_family("wan", "tiny-i2v", task="i2v"), str(folder))


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("wan", "tiny-i2v"), tmp_path / "checkpoint"))


@pytest.mark.parametrize("part", LOADERS)
def test_a_whole_part_is_loaded(folder: Path, part: str):
    assert load(folder, part) is not None


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_message(folder: Path, part: str, damage: Callable[[Path], Path]):
    where = damage(folder / part)
    with pytest.raises(UserError, match=f"(?s){where}.* can't be loaded: .*{DAMAGE[damage]}") as error:
        load(folder, part)
    assert error.value.problems[0].fix == "download this part again"


@pytest.mark.parametrize("content", [None, "{no"])
def test_a_damaged_tokenizer_is_one_clear_message(folder: Path, content: str | None):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(content, encoding="utf-8") if content else path.unlink()
    with pytest.raises(UserError, match=r"tokenizer.* can't be loaded: ") as error:
        load(folder, "text_encoder")
    assert error.value.problems[0].fix == "download this part again"


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("Qwen2Tokenizer", {"tokenizer.json": "{}"}),
        ("T5TokenizerFast", {"spiece.model": "no protobuf"}),
        ("CLIPTokenizer", {"vocab.json": '{"a": 0}', "merges.txt": "#version\na b c d\n"}),
    ],
)
def test_a_damaged_vocabulary_is_one_clear_message(folder: Path, kind: str, files: dict[str, str]):
    part = folder / "tokenizer"
    shutil.rmtree(part)
    part.mkdir()
    for name, content in (files | {"tokenizer_config.json": json.dumps({"tokenizer_class": kind})}).items():
        (part / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"(?s){part} can't be loaded: ") as error:
        load(folder, "text_encoder")
    assert error.value.problems[0].fix == "download this part again"


@pytest.mark.parametrize(("part", "key"), [("transformer", "axes_dims"), ("vae", "norm_num_groups")])
def test_a_config_without_a_key_is_one_clear_message(tiny_checkpoint: Callable[..., Path], tmp_path: Path, part: str, key: str):
    folder = Path(shutil.copytree(tiny_checkpoint("kandinsky5_video"), tmp_path / "checkpoint"))
    path = folder / part / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[key]  # the class then takes a default that does not fit the other values
    path.write_text(json.dumps(values), encoding="utf-8")
    message = f"{path} can't be loaded: no \\w+ can be built from it: \\w+Error"
    with pytest.raises(UserError, match=message), loading(folder, (part,)):
        pass


def test_a_config_that_a_library_can_not_read_is_one_clear_message(folder: Path):
    path = folder / "text_encoder" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"num_heads": "two"}), encoding="utf-8")
    with pytest.raises(UserError, match=f"{path} can't be loaded: no UMT5EncoderModel can be built from it: .*num_heads"):
        load(folder, "text_encoder")


def test_a_vision_model_may_have_the_config_of_the_pair(folder: Path):
    """transformers loads CLIP's vision model from the config of the whole CLIP too."""
    path = folder / "image_encoder" / "config.json"
    vision = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}), encoding="utf-8")
    assert load(folder, "image_encoder") is not None


@pytest.mark.parametrize(
    "error",
    [
        TypeError("from_pretrained() got an unexpected keyword argument"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("a wrong value"),
        KeyError("a wrong name"),
    ],
)
def test_an_error_of_the_program_is_itself(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("diffusers.WanTransformer3DModel.from_pretrained", broken)
    with pytest.raises(type(error)) as raised:
        load(folder, "transformer")
    assert raised.value is error
