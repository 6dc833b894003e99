"""What is reported of adapter files beside what diffusers really does with them."""

import json

import diffusers
import pytest
import torch
from common import tiny_family
from foreign_adapters import GOOD, WRONG, size_of
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from crepatrain.adapters.adapter_file import Model, read_adapter
from crepatrain.adapters.compatibility import diffusers_compatibility


class Loaded:
    """A tiny pipeline with nothing but its transformer, into which files are really loaded."""

    def __init__(self, family, folder):
        self.family = family
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name in index if name.startswith(("text_enc", "tokenizer", "image_"))}
        self.pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder, **absent)

    def deltas(self, path):
        """By layer what the file adds to its weight; of a layer that is not filled None. Raises what diffusers raises."""
        fresh = self.family.transformer_class.from_config(dict(self.family.checkpoint.transformer))
        self.pipeline.register_modules(transformer=fresh)
        self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="loaded")
        return {
            name: None if any(part.is_meta for part in module.parameters()) else module.get_delta_weight("loaded")
            for name, module in fresh.named_modules()
            if isinstance(module, LoraLayer)
        }


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    made = {}

    def of(family):
        if family not in made:
            made[family] = Loaded(tiny_family(family, size_of(family)), tiny_checkpoint(family, size_of(family)))
        return made[family]

    return of


@pytest.mark.parametrize("case", {**WRONG, **GOOD})
def test_diffusers_does_what_is_reported(case, foreign, loaded, tmp_path):
    """Every file is really loaded: refused with the reported exception, or into the reported layers at the reported strengths."""
    family, make, _ = (WRONG | GOOD)[case]
    adapter = foreign(family)
    tensors, metadata = make(adapter)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    file, model = read_adapter(path), Model(adapter.family, adapter.family.empty_transformer(), family)
    found = diffusers_compatibility(file, model)
    if found.refusal:
        with pytest.raises(Exception) as error:  # noqa: PT011 - whichever is reported
            loaded(family).deltas(path)
        assert found.refusal.startswith(type(error.value).__name__)
        return
    deltas = loaded(family).deltas(path)
    # To an image-to-video model diffusers adds zeros for what a file does not have.
    filled = {layer for layer, delta in deltas.items() if delta is not None and (delta.any() or layer in found.strengths)}
    assert filled == found.strengths.keys()
    for pair in file.pairs.values():
        layer = model.find(pair)
        if layer in filled and pair.complete:
            expected = found.strengths[layer] * pair.up.float() @ pair.down.float()
            torch.testing.assert_close(deltas[layer], expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_a_bug_or_a_library_that_does_not_fit_is_not_blamed_on_a_file(foreign, tmp_path, monkeypatch):
    """Diffusers raises the same for an adapter that is known to be right: so this comes out as it is."""
    adapter, path = foreign("wan"), tmp_path / "lora.safetensors"
    save_file(adapter.exported(), path)
    for step, error in (
        ("load_lora_into_transformer", RuntimeError("CUDA error: unknown")),
        ("lora_state_dict", TypeError("a bug")),
    ):

        def fail(*_args, error=error, **_settings):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(diffusers.WanPipeline, step, fail)
            patched.setattr(diffusers.WanImageToVideoPipeline, step, fail)
            model = Model(adapter.family, adapter.family.empty_transformer(), "wan")
            with pytest.raises(type(error), match=str(error)):
                diffusers_compatibility(read_adapter(path), model)
