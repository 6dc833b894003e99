"""Placing a transformer: with weights and without."""

import pytest
import torch

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.placement.placing import materialise, place, set_attention
from crepatrain.specs import FAMILIES
from crepatrain.training import build

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformer_without_values_is_placed_like_one_with_weights(tiny_checkpoint, config_file, name):
    size = {"height": 128, "width": 192, "num_frames": 17} if name == "ltxvideo" else {}
    folder = str(tiny_checkpoint(name))
    plan = read_plan(
        config_file(model_family=name, pretrained_model_name_or_path=folder, mixed_precision="bf16", crepa_enabled=False, **size)
    )
    family, placed = build.build_family(plan), []
    for transformer in (build.load_transformer(plan, family, CPU), build.empty_transformer(plan, family)):
        build.adapt(plan, family, transformer)
        place(plan.config.loop, family, transformer, CPU)
        placed.append(transformer)
    for tensors in ("named_parameters", "named_buffers"):
        full, empty = (
            {key: (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad) for key, tensor in getattr(module, tensors)()}
            for module in placed
        )
        assert full == empty
    assert all(module.training and module.is_gradient_checkpointing for module in placed)


@pytest.mark.parametrize("backend", ["_flash_3_hub", "no_such_kernel"])
def test_an_attention_backend_that_can_not_be_had_is_refused(config_file, backend):
    plan = read_plan(config_file(crepa_enabled=False))
    family = build.build_family(plan)
    transformer = build.empty_transformer(plan, family)
    config = plan.config.changed(attention_backend=backend).loop
    with pytest.raises(UserError, match=f"attention_backend={backend}"):
        set_attention(config, family, transformer)


def test_materialise_reaches_plain_attributes_and_keeps_ties():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
        module.register_buffer("buffer", torch.zeros(4))
        module.plain = torch.zeros(5, dtype=torch.float64)
        module.tied = torch.nn.Module()
        module.tied.weight = module.weight
    materialise(module)
    assert {t.device.type for t in (module.weight, module.bias, module.buffer, module.plain)} == {"cpu"}
    assert module.tied.weight is module.weight
    assert module.plain.dtype == torch.float64
