"""What the user should know though nothing is wrong."""

import json

import pytest

from crepatrain.config.plan import read_plan

BACKBONE = {"crepa_feature_source": "backbone"}


def test_a_clean_config_has_no_warnings(plan):
    assert plan().warnings == ()


OFF = {"crepa_enabled": ..., "crepa_encoder": ..., "crepa_encoder_image_size": ...}


REFERENCE = {
    "crepa_block_index": 8,
    "crepa_lambda": 0.5,
    "crepa_adjacent_distance": 1,
    "crepa_adjacent_tau": 1.0,
    "crepa_encoder": "dinov2_vitg14",
    "crepa_encoder_image_size": 518,
}


def test_crepa_keys_without_crepa_are_reported(plan):
    assert plan(**OFF).warnings == ()
    assert plan(**OFF | {"crepa_enabled": False}).warnings == ()
    [warning] = plan(**OFF, crepa_lambda=0.3).warnings
    assert warning == "crepa_lambda: without effect, as crepa_enabled is false"
    [warning] = plan(layersync_student_block=1).warnings
    assert warning == "layersync_student_block: without effect, as layersync_enabled is false"


def test_crepa_keys_without_crepa_are_reported_at_their_defaults_too(plan, config_file):
    [warning] = plan(**OFF | REFERENCE).warnings
    assert warning == f"{', '.join(REFERENCE)}: without effect, as crepa_enabled is false"
    options = ["--crepa_enabled", "false", "--crepa_lambda", "0.5"]
    assert "crepa_lambda" in read_plan(config_file(), options, online=False).warnings[0]
    [warning] = plan(layersync_lambda=0.2).warnings
    assert "layersync_lambda" in warning


@pytest.mark.parametrize("crepa", [{}, OFF, BACKBONE | {"crepa_teacher_block_index": 9} | OFF | {"crepa_enabled": True}])
@pytest.mark.parametrize("added_since", [set(), {"crepa_cache_dtype", "crepa_threshold_metric", "use_ema"}])
def test_the_config_of_a_run_says_every_key_and_wishes_for_none_of_its_defaults(plan, crepa, added_since):
    written = json.loads(json.dumps(plan(**crepa).config.model_dump()))
    assert written["flow_shift"] == 3.0
    assert plan(**{key: ... if key in added_since else value for key, value in written.items()}).warnings == ()
    [warning] = plan(**written | {"crepa_power": 2.0}).warnings
    assert warning.startswith("crepa_power: without effect")


@pytest.mark.parametrize(("frames", "distance", "capped"), [(9, 2, None), (9, 3, 2), (9, 50, 2), (1, 1, 0)])
def test_a_distance_beyond_the_clip_is_capped_and_reported_once(plan, frames, distance, capped):
    found = plan(num_frames=frames, crepa_adjacent_distance=distance)
    shown = [warning for warning in found.warnings if "crepa_adjacent_distance" in warning]
    if capped is None:
        assert not shown
    else:
        assert len(shown) == 1
        assert f"crepa_adjacent_distance={distance}" in shown[0]
        assert f"as {capped}" in shown[0]


FADING = {"crepa_scheduler": "cosine"}


THRESHOLD = {"crepa_similarity_threshold": 0.8}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"crepa_lambda_end": 0.1, "crepa_decay_steps": 9},
            "crepa_decay_steps, crepa_lambda_end: * as crepa_scheduler is constant",
        ),
        ({"crepa_lambda_end": 0.0}, "crepa_lambda_end: * as crepa_scheduler is constant; use linear, cosine or polynomial"),
        ({"crepa_power": 2.0} | FADING, "crepa_power: * as crepa_scheduler is cosine"),
        ({"crepa_lambda": 0.0}, "crepa_enabled: * as crepa_lambda is 0"),
        ({"crepa_cutoff_step": 3}, "crepa_cutoff_step: * as the run ends at step 3"),
        ({"crepa_warmup_steps": 3}, "crepa_warmup_steps=3: the run ends at step 3, before it reaches crepa_lambda"),
        (
            {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 5, "crepa_similarity_ema_decay": 0.9},
            "crepa_similarity_ema_decay, crepa_threshold_mode, crepa_probe_interval: * as crepa_similarity_threshold is null",
        ),
        ({"crepa_threshold_metric": "self"}, "crepa_threshold_metric: * as crepa_similarity_threshold is null"),
        ({"crepa_probe_interval": 5} | THRESHOLD, "crepa_probe_interval: * as crepa_threshold_mode is permanent"),
        ({"crepa_similarity_threshold": 0}, "crepa_similarity_threshold=0: CREPA is turned off almost at once"),
        ({"crepa_similarity_threshold": -0.5}, "crepa_similarity_threshold=-0.5: CREPA is turned off almost at once"),
        (
            {"crepa_adjacent_distance": 0, "crepa_adjacent_tau": 2.0, "crepa_normalize_neighbour_sum": True},
            "crepa_adjacent_tau, crepa_normalize_neighbour_sum: * as crepa_adjacent_distance is 0",
        ),
        ({"crepa_cumulative_neighbors": True}, "crepa_cumulative_neighbors: * as crepa_adjacent_distance is 1"),
        ({"crepa_teacher_block_index": 9}, "crepa_teacher_block_index: * as crepa_feature_source is cached"),
        (
            BACKBONE | {"crepa_teacher_block_index": 9, "crepa_encoder_frames_batch_size": 4},
            "crepa_encoder, crepa_encoder_image_size, crepa_encoder_frames_batch_size: * as crepa_feature_source is backbone",
        ),
        (
            {"crepa_feature_source": "pixels", "crepa_cache_dtype": "int8"},
            "crepa_cache_dtype: * as crepa_feature_source is pixels",
        ),
        (
            {"crepa_drop_vae_encoder": True},
            "crepa_drop_vae_encoder: * as only crepa_feature_source=latents keeps a VAE in training",
        ),
        ({"revision": "main"}, "revision: * as pretrained_model_name_or_path is a folder"),
        (
            {"timestep_sampling": "uniform", "logit_mean": 0.5, "logit_std": 2.0},
            "logit_mean, logit_std: * as timestep_sampling is uniform",
        ),
        ({"flow_shift": 5.0}, "flow_shift: * as timestep_sampling is logit_normal"),
        ({"ema_decay": 0.9}, "ema_decay: * as use_ema is false"),
        ({"eval_seed": 1}, "eval_seed: * as eval_data is null and eval_share is 0"),
        (
            {"optimizer": "adafactor", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
            "adam_beta1, adam_beta2, adam_epsilon: * as optimizer is adafactor",
        ),
        (
            {"lr_scheduler": "constant", "lr_warmup_steps": 2},
            "lr_warmup_steps: * as lr_scheduler is constant; use constant_with_warmup",
        ),
        ({"lr_warmup_steps": 3}, "lr_warmup_steps=3: the run ends at step 3, before it reaches learning_rate"),
        (
            {"validation_images": [__file__], "validation_steps": 9, "validation_seed": 1, "validation_sampling_steps": 9},
            "validation_images, validation_steps, validation_seed, validation_sampling_steps: * as validation_prompts is null",
        ),
        ({"validation_prompts": ["a"], "validation_images": [__file__]}, "validation_images: * as task is t2v"),
    ],
)
def test_what_has_no_effect_is_reported_once(plan, changes, shown):
    [warning] = plan(**changes).warnings
    assert warning.startswith(shown.replace("*", "without effect,"))


@pytest.mark.parametrize(
    "changes",
    [
        FADING | {"crepa_lambda": 0.0, "crepa_lambda_end": 0.1, "crepa_decay_steps": 9},
        {"crepa_scheduler": "polynomial", "crepa_power": 2.0},
        {"crepa_cutoff_step": 2, "crepa_warmup_steps": 2, "lr_warmup_steps": 2},
        {"crepa_cutoff_step": 900, "crepa_warmup_steps": 900, "max_train_steps": ..., "num_train_epochs": 2},
        THRESHOLD | {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 5, "crepa_threshold_metric": "self"},
        {"crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True, "crepa_adjacent_tau": 2.0},
        BACKBONE | {"crepa_teacher_block_index": 9, "crepa_encoder": ..., "crepa_encoder_image_size": ...},
        {"crepa_feature_source": "latents", "crepa_drop_vae_encoder": True},
        {"crepa_cache_dtype": "int8"},
        {"timestep_sampling": "shifted", "flow_shift": 5.0},
        {"logit_mean": 0.5, "use_ema": True, "ema_decay": 0.9, "adam_beta1": 0.8},
        {"optimizer": "adafactor", "adam_weight_decay": 0.1},
        {"validation_prompts": ["a"], "validation_steps": 9},
        {"logit_mean": 0.0, "timestep_sampling": "uniform", "ema_decay": 0.999, "revision": None, "validation_steps": 500},
    ],
)
def test_what_has_an_effect_is_not_reported(plan, changes):
    assert plan(**changes).warnings == ()


def test_a_dropout_of_first_frames_without_conditioning_is_reported(plan, tiny):
    [warning] = plan(i2v_dropout=0.1).warnings
    assert warning == "i2v_dropout: without effect, as task is t2v"
    [warning] = plan(**tiny("ltxvideo"), i2v_dropout=0.1).warnings
    assert "i2v_dropout" in warning
    assert plan(**tiny("ltxvideo"), task="i2v", i2v_dropout=0.1).warnings == ()
    assert plan(i2v_dropout=0.0).warnings == ()


def test_keys_of_an_adapter_without_an_adapter_are_reported(plan):
    [warning] = plan(model_type="full", lora_alpha=2.0, lora_use_rslora=True).warnings
    assert warning == "lora_rank, lora_alpha, lora_use_rslora: without effect, as model_type is full"
    assert plan(model_type="full", lora_rank=32, lora_dropout=0.0).warnings == (), "their defaults"
    assert plan(lora_alpha=2.0, lora_use_rslora=True).warnings == ()


def test_a_prefix_or_suffix_that_runs_into_the_caption_is_reported(plan):
    [warning] = plan(caption_prefix="zxcq person").warnings
    assert warning == "caption_prefix='zxcq person' is one word with the caption's first; end it in a space"
    [warning] = plan(caption_suffix="4k").warnings
    assert warning == "caption_suffix='4k' is one word with the caption's last; begin it with a space"
    assert plan(caption_prefix="zxcq person, ", caption_suffix=", 4k").warnings == ()
