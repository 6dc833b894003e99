"""The sections: one home for every key and default, each described to the user."""

import json

import pytest
from pydantic import ValidationError

from crepatrain.config.load import parse
from crepatrain.config.plan import make_plan, read_plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.run_config import KEYS, SECTIONS, RunConfig
from crepatrain.config.summary import summarize
from crepatrain.specs import FAMILIES

# ../shared/reference/video-crepa.txt with METHOD.md, sections 3, 4 and 6.
REFERENCE_DEFAULTS = {
    "crepa_enabled": False,
    "crepa_lambda": 0.5,
    "crepa_adjacent_distance": 1,
    "crepa_adjacent_tau": 1.0,
    "crepa_encoder": "dinov2_vitg14",
    "crepa_encoder_image_size": 518,
    "crepa_spatial_align": True,
    "crepa_normalize_by_frames": True,
    "crepa_drop_vae_encoder": False,
    "crepa_cumulative_neighbors": False,
    "crepa_use_backbone_features": False,
    "crepa_teacher_block_index": None,
    "crepa_scheduler": "constant",
    "crepa_warmup_steps": 0,
    "crepa_decay_steps": 0,
    "crepa_lambda_end": 0.0,
    "crepa_cutoff_step": 0,
    "crepa_similarity_threshold": None,
    "crepa_similarity_ema_decay": 0.99,
    "crepa_threshold_mode": "permanent",
}
# METHOD.md's own.
METHOD_DEFAULTS = {
    "crepa_normalize_neighbour_sum": False,
    "crepa_projector": "linear",
    "crepa_projector_lr": None,
    "crepa_feature_source": "cached",
    "crepa_threshold_metric": "alignment",
    "crepa_probe_interval": 10,
    "layersync_enabled": False,
    "layersync_student_block": None,
    "layersync_teacher_block": None,
    "layersync_lambda": 0.2,
}
DESIGN_KEYS = [
    "model_family",
    "pretrained_model_name_or_path",
    "revision",
    "model_type",
    "lora_rank",
    "lora_alpha",
    "train_data",
    "height",
    "width",
    "num_frames",
    "fps",
    "output_dir",
    "seed",
    "learning_rate",
    "optimizer",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_grad_norm",
    "mixed_precision",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "logging_steps",
]
ISSUE_KEYS = [
    "output_name",
    "missing_captions",
    "timestep_sampling",
    "flow_shift",
    "caption_dropout",
    "num_train_epochs",
    "crepa_power",
    "crepa_block_index",
    "crepa_encoder_frames_batch_size",
]


def test_every_key_is_in_one_section():
    keys = [key for section in SECTIONS.values() for key in section.model_fields]
    assert len(keys) == len(set(keys))
    assert list(KEYS) == keys
    assert all(key in SECTIONS[info.section].model_fields for key, info in KEYS.items())
    assert not set(keys) & set(SECTIONS), "a section is never taken for a key"


def test_a_config_is_made_from_and_dumped_as_one_flat_object(values):
    config = RunConfig.model_validate(values)
    assert list(config.model_dump()) == list(KEYS)
    assert config.model_dump().items() >= values.items()
    assert config.crepa.crepa_enabled is config.value("crepa_enabled") is True
    assert config.explicitly_set == values.keys()
    assert RunConfig.model_validate(config.model_dump()) == config
    assert json.loads(config.model_dump_json()) == json.loads(json.dumps(config.model_dump()))


@pytest.mark.parametrize("unknown", ["crepa", "model", "crepa_lamda"])
def test_a_key_that_is_none_is_refused_and_so_is_a_sections_name(values, unknown):
    with pytest.raises(ValidationError, match=unknown):
        RunConfig.model_validate(values | {unknown: {}})


def test_a_changed_config_is_another_one_of_the_same_kind(values, config_file):
    config = RunConfig.model_validate(values)
    changed = config.changed(crepa_lambda=0.25, seed=1)
    assert (changed.crepa.crepa_lambda, changed.loop.seed) == (0.25, 1)
    assert changed.explicitly_set == values.keys() | {"crepa_lambda", "seed"}
    assert config == RunConfig.model_validate(values)
    with pytest.raises(ValidationError):
        config.changed(crepa_lambda=-1)
    with pytest.raises(KeyError):
        config.changed(crepa_lamda=1)
    resolved = read_plan(config_file()).config
    assert isinstance(resolved.changed(height=128), ResolvedConfig)
    assert resolved.changed(height=128).data.size == (9, 128, 96)


@pytest.mark.parametrize(("key", "default"), (REFERENCE_DEFAULTS | METHOD_DEFAULTS).items())
def test_the_methods_defaults(key, default):
    found = KEYS[key].field.default
    assert found == default
    assert type(found) is type(default)


@pytest.mark.parametrize("key", DESIGN_KEYS + ISSUE_KEYS)
def test_the_keys_that_were_promised(key):
    assert key in KEYS


def test_the_block_is_the_familys_where_none_is_named(config_file):
    assert KEYS["crepa_block_index"].field.default is None
    assert FAMILIES["wan"].default_block == 8
    assert read_plan(config_file()).config.crepa.crepa_block_index == 8


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_described_and_ranges_hold_their_default(key, values):
    field = KEYS[key].field
    assert field.description
    assert field.description == field.description.strip()
    assert field.description[0].isupper() or field.description.startswith(("t2v:", "no:", "true ", "permanent:")), "sentences"
    assert field.description.endswith(".")
    if not field.is_required():
        problems = []
        parse(values | {key: field.default}, problems)
        assert not problems, "pydantic does not validate defaults by itself"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crepa_enabled": False, "crepa_encoder": ..., "crepa_encoder_image_size": ...},
        {"crepa_use_backbone_features": True, "crepa_block_index": 3, "crepa_teacher_block_index": 9},
        {"crepa_feature_source": "backbone", "crepa_block_index": 3, "crepa_teacher_block_index": 9},
        {"max_train_steps": ..., "num_train_epochs": 2, "lora_targets": "all-linear", "crepa_projector_lr": 1e-2},
        {"layersync_enabled": True, "layersync_student_block": 2, "layersync_teacher_block": 7},
        {"lora_targets": r"blocks\..*to_q", "lora_use_rslora": True},
        {"model_type": "full", "lora_rank": ...},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_a_resolved_config_means_the_same_again(config_file, changes):
    plan = read_plan(config_file(**changes))
    written = json.loads(json.dumps(plan.config.model_dump()))
    problems = []
    config, wrong = parse(written, problems)
    assert not problems
    assert not wrong
    assert config is not None
    again = make_plan(config)
    assert again.config == plan.config
    assert summarize(again) == summarize(plan)
    assert again.warnings == plan.warnings


def test_a_resolved_config_has_every_default_filled_in(config_file):
    config = read_plan(config_file(height=..., width=..., num_frames=..., cache_dir=...)).config
    spec = FAMILIES["wan"]
    assert (config.data.height, config.data.width, config.data.num_frames) == (480, 832, 81)
    assert config.data.fps == 16
    assert config.model.task == "t2v"
    assert config.lora.lora_alpha == config.lora.lora_rank
    assert config.lora.lora_targets == list(spec.lora_targets)
    assert config.crepa.crepa_projector_lr == config.optim.learning_rate
    assert config.data.cache_dir.endswith("crepatrain")


def test_a_resolved_config_of_another_family_has_its_defaults(config_file, tiny_checkpoint):
    of = {"model_family": "ltxvideo", "pretrained_model_name_or_path": str(tiny_checkpoint("ltxvideo"))}
    config = read_plan(config_file(**of, height=..., width=..., num_frames=...)).config
    assert (config.data.height, config.data.width, config.data.num_frames, config.data.fps) == (512, 704, 121, 25)
    assert config.diffusion.flow_shift == pytest.approx(13.464, rel=1e-3), "at the config's own size"
    smaller = read_plan(config_file(**of)).config
    assert smaller.diffusion.flow_shift < 3
    of = {"model_family": "kandinsky5_video", "pretrained_model_name_or_path": str(tiny_checkpoint("kandinsky5_video"))}
    config = read_plan(config_file(**of, height=..., width=..., num_frames=..., lora_rank=8)).config
    assert (config.data.height, config.data.width, config.data.num_frames, config.data.fps) == (512, 768, 121, 24)
    assert (config.lora.lora_alpha, config.lora.lora_targets) == (8, list(FAMILIES["kandinsky5_video"].lora_targets))
    assert config.diffusion.flow_shift == 5


def test_the_flow_shift_is_the_checkpoints_unless_it_is_set(config_file, wan):
    scheduler = json.loads((wan / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    theirs = scheduler.get("flow_shift") or scheduler["shift"]
    assert read_plan(config_file()).config.diffusion.flow_shift == theirs
    assert read_plan(config_file(flow_shift=7)).config.diffusion.flow_shift == 7


def test_the_schema_lists_every_key_and_allows_no_other():
    schema = json.loads(json.dumps(RunConfig.model_json_schema(), allow_nan=False))
    assert schema["properties"].keys() - {"$schema", "config_version"} == KEYS.keys()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model_family", "pretrained_model_name_or_path", "train_data", "output_dir"}
    assert all(schema["properties"][key].get("description") for key in KEYS)
    assert schema["properties"]["model_family"]["enum"] == list(FAMILIES)
    assert "$defs" not in schema
    assert schema["properties"]["crepa_lambda"] == {
        "default": 0.5,
        "description": "Weight of the alignment loss.",
        "if_allowed": True,
        "minimum": 0,
        "section": "crepa",
        "title": "Weight",
        "type": "number",
    }


def test_the_schema_describes_the_sections_for_a_form():
    schema = RunConfig.model_json_schema()
    assert {key: schema["properties"][key]["section"] for key in KEYS} == {key: info.section for key, info in KEYS.items()}
    assert [section["name"] for section in schema["sections"]] == list(reversed(SECTIONS))
    assert all(section["title"] and section["description"] for section in schema["sections"])
    assert schema["sections"][0] == {
        "name": "model",
        "title": "Model",
        "description": "Which model is trained, and where it comes from.",
    }


def test_only_how_a_run_is_watched_or_how_long_it_is_may_change():
    may = {key for key in KEYS if KEYS[key].may_change}
    assert {"max_train_steps", "checkpointing_steps", "logging_steps", "output_name"} <= may
    assert [key for key in may if key.startswith(("crepa_", "lora_", "layersync_", "adam_"))] == ["crepa_encoder"]
    assert not may & {"task", "wan_expert", "i2v_dropout", "model_type"}
    assert not may & {"learning_rate", "seed", "height", "width", "num_frames", "fps", "train_batch_size", "model_family"}
