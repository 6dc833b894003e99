"""A stage of a run on tensors without values: what it holds is what it holds with them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from plans import bucket_of, plans
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crepatrain.errors import UserError
from crepatrain.memory import stages
from crepatrain.memory.account import StorageAccount
from crepatrain.placement.inference import weights_bytes
from crepatrain.placement.quantizing import quantize_text_model
from crepatrain.specs import FAMILIES
from crepatrain.training import build


@pytest.fixture
def plan_of(tiny_checkpoint, config_file):
    return plans(tiny_checkpoint, config_file)


CONFIGS = [
    {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "gradient_checkpointing": False, "train_batch_size": 2},
    {"model_type": "full", "gradient_accumulation_steps": 2, "use_ema": True},
    {"crepa_enabled": False},
    {"mixed_precision": "bf16", "gradient_checkpointing": "selective"},
    {"mixed_precision": "bf16", "checkpoint_offload": True, "nested_checkpointing": True},
    {"gradient_checkpointing": "selective", "checkpoint_offload": True, "block_offload": 5},
    {"mixed_precision": "bf16", "base_quantization": "int8", "nested_checkpointing": True, "block_offload": 10},
    {"mixed_precision": "bf16", "base_quantization": "int8"},
    {"mixed_precision": "bf16", "base_quantization": "fp8"},
    {"mixed_precision": "bf16", "base_quantization": "nf4"},
]


def of_families(cases):
    """All of them for one family; for the others the first here, the rest in the long form."""
    return [
        pytest.param(family, changes, marks=[pytest.mark.slow] * (family != "wan" and number > 0), id=f"{family}-{number}")
        for family in FAMILIES
        for number, changes in enumerate(cases)
    ]


@pytest.mark.parametrize(("family", "changes"), of_families(CONFIGS))
def test_the_account_without_values_is_the_real_one_to_the_byte(plan_of, family, changes):
    plan = plan_of(family, **changes)
    fake, real = (stages.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert fake.op
    assert {"transformer", "activations", "optimizer", "batch"} <= fake.by_owner.keys()


class Attentions(TorchDispatchMode):
    """Counts the forward passes of attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "wan")) for name in FAMILIES])
def test_attention_that_is_kept_is_computed_once(plan_of, family):
    counts, peaks = {}, {}
    for how in (False, True, "selective"):
        plan = plan_of(family, gradient_checkpointing=how, crepa_enabled=False)
        step, account, seen = stages.TrainingStep(plan, bucket_of(plan)), StorageAccount(), Attentions()
        with FakeTensorMode(allow_non_fake_inputs=True), seen, account:
            step.place(account)
            account.begin()
            step.run(account)
            peaks[how] = account.on(torch.device("cpu")).peak
        counts[how] = seen.count
    assert counts["selective"] == counts[False] > 0
    assert counts[True] > 1.9 * counts[False]  # what follows a block's last saved tensor is not computed again
    assert peaks[True] < peaks["selective"] < peaks[False]


def test_other_optimizers_hold_less(plan_of, monkeypatch):
    monkeypatch.setattr("crepatrain.config.checks.find_spec", lambda _: True)  # the estimate needs no bitsandbytes
    held = {}
    for optimizer in ("adamw", "adamw8bit", "adafactor"):
        plan = plan_of(model_type="full", optimizer=optimizer, crepa_enabled=False)
        held[optimizer] = stages.training_stage(plan, bucket_of(plan)).by_owner["optimizer"]
    # Tiny tensors are rounded up to 512 bytes each, so less is saved than of large ones.
    assert held["adamw8bit"] < 0.7 * held["adamw"]
    assert held["adafactor"] < 0.7 * held["adamw"]


@pytest.mark.parametrize("source", ["pixels", "latents", "backbone"])
def test_every_teacher_is_accounted_for(plan_of, source):
    plan = plan_of(crepa_feature_source=source, **{"crepa_teacher_block_index": 9} if source == "backbone" else {})
    fake, real = (stages.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert ("teacher" in fake.by_owner) == (source != "backbone")
    assert ("VAE" in fake.by_owner) == (source == "latents")


@pytest.mark.parametrize("family", ["wan", pytest.param("ltxvideo", marks=pytest.mark.slow)])
def test_a_validation_video_is_accounted_for(plan_of, family):
    plan = plan_of(family, validation_prompts=["a"], mixed_precision="bf16")
    fake, real = (stages.sampling_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert {"transformer", "adapter", "VAE", "optimizer", "activations"} <= fake.by_owner.keys()


@pytest.mark.parametrize(("family", "name"), [("wan", "tiny-i2v"), ("wan", "tiny-i2v-a14b"), ("ltxvideo", "tiny")])
def test_a_first_frame_is_accounted_for(plan_of, family, name):
    expert = {"wan_expert": "low"} if "a14b" in name else {}
    plan = plan_of(family, name, task="i2v", **expert)
    fake, real = (stages.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real


def test_parts_weigh_what_they_weigh(plan_of):
    plan = plan_of(crepa_enabled=False, gradient_checkpointing=False)
    found = stages.training_stage(plan, bucket_of(plan)).by_owner
    family = build.build_family(plan)
    transformer = family.empty_transformer()
    build.adapt(plan, family, transformer)

    def weigh(tensors):
        return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)

    frozen = [p for p in transformer.parameters() if not p.requires_grad] + list(transformer.buffers())
    adapter = [p for p in transformer.parameters() if p.requires_grad]
    assert found["transformer"] == weigh(frozen)
    assert found["adapter"] == weigh(adapter)
    steps = 512 * (len(adapter) + 1)  # AdamW counts them, one number each, and keeps a scalar that says whether to move
    assert found["optimizer"] == 2 * weigh(adapter) + steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["none", "int8", "nf4"])
def test_a_text_encoder_weighs_what_it_weighs_on_the_device(plan_of, family, how):
    """Of a folder by its own models, and of a released one by what is known of it."""
    plan = plan_of(family, text_encoder_quantization=how, text_encoder_offload=False)
    made = build.build_family(plan)
    models = made.text_models(made.load_text_encoder(plan.config.model.pretrained_model_name_or_path, torch.bfloat16))
    for model in models:
        quantize_text_model(model, how, torch.device("cpu"))
    assert stages.text_stage(plan).allocated == weights_bytes(models)
    known = replace(plan.checkpoint, origin="package")
    weights = {
        offload: stages.text_stage(
            replace(plan, config=plan.config.changed(text_encoder_offload=offload), checkpoint=known)
        ).allocated
        for offload in (False, True, "auto")
    }
    bits = {"none": 2, "int8": 1, "nf4": 0.56}[how]
    sizes = plan.spec.text_parameters
    assert weights[False] == pytest.approx(2 * sizes.outside + bits * (sizes.total - sizes.outside), rel=0.01)
    assert weights[True] == weights["auto"] == pytest.approx(2 * sizes.outside + 2 * bits * sizes.largest, rel=0.01)


def test_tiles_need_less_memory(plan_of):
    """Whatever is encoded and decoded in them: both stages are those of a run with such a VAE."""
    changes = {"crepa_enabled": False, "height": 512, "width": 512, "num_frames": 1}
    for stage in (stages.caching_stage, stages.sampling_stage):
        whole, tiled = (plan_of(**changes, vae_tiling=tiling) for tiling in (False, True))
        assert stage(tiled, bucket_of(tiled)).allocated < 0.7 * stage(whole, bucket_of(whole)).allocated


def test_nabla_has_no_estimate_and_says_so(plan_of):
    plan = plan_of("kandinsky5_video", "tiny-nabla", height=128, width=128, compile=True)
    with pytest.raises(UserError, match=r"no estimate for .*tiny-nabla: its step does not run"):
        stages.training_stage(plan, bucket_of(plan))


@pytest.mark.parametrize("error", [TypeError("a wrong argument"), RuntimeError("CUDA error: an illegal memory access")])
def test_an_error_of_the_program_in_the_step_is_itself(plan_of, monkeypatch, error):
    def broken(*_args, **_kwargs):
        raise error

    plan = plan_of(crepa_enabled=False)
    monkeypatch.setattr(stages, "training_loss", broken)
    with pytest.raises(type(error)) as raised:
        stages.training_stage(plan, bucket_of(plan))
    assert raised.value is error
