"""The steps of a new run: which keys of a config stand where. Every key stands once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Keys under one heading.

    Attributes:
        folded: whether it is closed at first, as few runs need it.
    """

    title: str
    keys: tuple[str, ...]
    folded: bool = False


@dataclass(frozen=True)
class Step:
    """A page of the new run.

    Attributes:
        name: in the address.
    """

    name: str
    title: str
    groups: tuple[Group, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """All keys of the page."""
        return frozenset(key for group in self.groups for key in group.keys)


STEPS = (
    Step(
        "model",
        "Model",
        (
            Group("Checkpoint", ("model_family", "pretrained_model_name_or_path", "task", "model_type")),
            Group("LoRA adapter", ("lora_rank", "lora_alpha")),
            Group(
                "More of the model",
                (
                    "wan_expert",
                    "revision",
                    "lora_targets",
                    "lora_dropout",
                    "lora_use_rslora",
                    "init_adapter",
                    "attention_backend",
                ),
                folded=True,
            ),
        ),
    ),
    Step(
        "data",
        "Data",
        (
            Group("Clips", ("train_data", "height", "width", "num_frames", "fps")),
            Group("Captions", ("caption_prefix", "caption_suffix", "caption_dropout", "missing_captions")),
            Group(
                "More of the data",
                (
                    "aspect_buckets",
                    "frame_buckets",
                    "clip_mode",
                    "crop",
                    "max_windows_per_clip",
                    "unusable_clips",
                    "i2v_dropout",
                    "cache_dir",
                    "dataloader_num_workers",
                ),
                folded=True,
            ),
        ),
    ),
    Step(
        "training",
        "Training",
        (
            Group("Run", ("output_dir", "output_name", "max_train_steps", "num_train_epochs", "checkpointing_steps")),
            Group("Optimizer", ("optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps")),
            Group("Step", ("train_batch_size", "gradient_accumulation_steps", "mixed_precision", "gradient_checkpointing")),
            Group("Memory", ("memory", "base_quantization", "block_offload", "checkpoint_offload", "nested_checkpointing")),
            Group("Encoders", ("text_encoder_offload", "text_encoder_quantization", "vae_dtype", "vae_tiling"), folded=True),
            Group(
                "More of the run",
                (
                    "seed",
                    "trigger_word",
                    "compile",
                    "checkpoints_total_limit",
                    "resume_from_checkpoint",
                    "allow_changes",
                    "logging_steps",
                    "report_to",
                ),
                folded=True,
            ),
            Group(
                "More of the optimizer",
                (
                    "adam_beta1",
                    "adam_beta2",
                    "adam_epsilon",
                    "adam_weight_decay",
                    "max_grad_norm",
                    "use_ema",
                    "ema_decay",
                ),
                folded=True,
            ),
            Group("Noise levels", ("timestep_sampling", "logit_mean", "logit_std", "flow_shift"), folded=True),
            Group("Hugging Face hub", ("push_to_hub", "hub_model_id", "hub_private_repo"), folded=True),
        ),
    ),
    Step(
        "loss-functions",
        "Loss functions",
        (
            Group(
                "CREPA",
                ("crepa_enabled", "crepa_block_index", "crepa_lambda", "crepa_adjacent_distance", "crepa_adjacent_tau"),
            ),
            Group("Vision encoder", ("crepa_encoder", "crepa_encoder_image_size", "crepa_feature_source")),
            Group(
                "Weight over the steps",
                (
                    "crepa_scheduler",
                    "crepa_warmup_steps",
                    "crepa_decay_steps",
                    "crepa_lambda_end",
                    "crepa_power",
                    "crepa_cutoff_step",
                ),
            ),
            Group(
                "Cutoff by similarity",
                (
                    "crepa_similarity_threshold",
                    "crepa_similarity_ema_decay",
                    "crepa_threshold_mode",
                    "crepa_threshold_metric",
                    "crepa_probe_interval",
                ),
            ),
            Group(
                "More of CREPA",
                (
                    "crepa_spatial_align",
                    "crepa_normalize_by_frames",
                    "crepa_cumulative_neighbors",
                    "crepa_normalize_neighbour_sum",
                    "crepa_projector",
                    "crepa_projector_lr",
                    "crepa_use_backbone_features",
                    "crepa_teacher_block_index",
                    "crepa_encoder_frames_batch_size",
                    "crepa_cache_dtype",
                    "crepa_drop_vae_encoder",
                ),
                folded=True,
            ),
            Group(
                "LayerSync",
                ("layersync_enabled", "layersync_student_block", "layersync_teacher_block", "layersync_lambda"),
                folded=True,
            ),
        ),
    ),
    Step(
        "validation",
        "Validation",
        (
            Group("Videos", ("validation_prompts", "validation_images", "validation_steps", "validation_sampling_steps")),
            Group("Held-out clips", ("eval_share", "eval_data")),
            Group("Seeds", ("validation_seed", "eval_seed"), folded=True),
        ),
    ),
    Step("memory", "Memory"),
    Step("review", "Review"),
)

# The settings of CREPA for a kind of clips; what one does not name is at its default.
CREPA_PRESETS = {
    "Text-to-video": {
        "crepa_enabled": True,
        "crepa_scheduler": "cosine",
        "crepa_lambda": 0.5,
        "crepa_warmup_steps": 100,
        "crepa_decay_steps": 0,
        "crepa_lambda_end": 0.1,
        "crepa_similarity_threshold": 0.85,
        "crepa_threshold_mode": "permanent",
    },
    "Image-to-video": {"crepa_enabled": True, "crepa_lambda": 0.5, "crepa_scheduler": "constant"},
    "Solid background": {"crepa_enabled": True, "crepa_lambda": 0.5, "crepa_cutoff_step": 2000},
    "Off": {"crepa_enabled": False},
}
# What a preset leaves as it is: where the alignment takes place and who the teacher is, not how much it weighs.
SCHEDULE_KEYS = frozenset(key for preset in CREPA_PRESETS.values() for key in preset)
