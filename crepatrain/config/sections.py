"""Every key of a config with its default, range and meaning, in the section of the part of the program that needs it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from crepatrain.config.fields import FamilyName, LoraTargets, PathText

# A run may go on after such a key was changed: it alters how the run is watched, how long it is, or where things lie. What lies
# there is compared with the checkpoint's fingerprint.
_MAY_CHANGE: dict[str, Any] = {"may_change": True}


class Section(BaseModel, frozen=True):
    """One part of the config: unknown keys are errors, values are taken as they are written, never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section, frozen=True):
    """Which model is trained, and where it comes from."""

    model_config = ConfigDict(title="Model")

    model_family: FamilyName = Field(description="Family of the model; `crepatrain families` lists them.")
    pretrained_model_name_or_path: PathText = Field(
        description="Folder of a diffusers pipeline, or its hub id.", json_schema_extra=_MAY_CHANGE
    )
    revision: str | None = Field(None, description="Branch, tag or commit, where the model is named by its hub id.")
    model_type: Literal["lora", "full"] = Field(
        "lora", description="What is trained. lora: an adapter; full: every weight of the transformer."
    )
    task: Literal["t2v", "i2v"] | None = Field(
        None,
        description="t2v: from text alone; i2v: from text and the clip's first frame. null: the checkpoint's own task.",
    )
    wan_expert: Literal["high", "low"] | None = Field(
        None,
        description="Which transformer of a Wan 2.2 A14B checkpoint is trained: that of high or that of low noise. Required "
        "for such a checkpoint, and only for such a one.",
    )


class LoraConfig(Section, frozen=True):
    """The adapter. Only used where model_type is lora."""

    model_config = ConfigDict(title="LoRA adapter")

    lora_rank: int = Field(32, ge=1, le=4096, description="Rank r of every adapted layer.")
    lora_alpha: float | None = Field(
        None, gt=0, description="The adapter is scaled by lora_alpha / lora_rank. null: the value of lora_rank, a scale of 1."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    lora_use_rslora: bool = Field(
        False, description="Scale the adapter by lora_alpha / sqrt(lora_rank) instead (rank-stabilized LoRA)."
    )
    init_adapter: PathText | None = Field(
        None,
        description="Begin with the weights of this adapter file, which must have the same rank and layers.",
        json_schema_extra=_MAY_CHANGE,
    )
    lora_targets: LoraTargets | None = Field(
        None,
        description="Which layers are adapted: a list of the ends of their names, a regex that matches whole names, or "
        "all-linear. null: the family's default.",
    )


class DataConfig(Section, frozen=True):
    """The clips and how they are cut into training windows."""

    model_config = ConfigDict(title="Data")

    train_data: PathText = Field(
        description="Folder of videos with captions in NAME.txt files, or a .jsonl or .csv list of videos and captions.",
        json_schema_extra=_MAY_CHANGE,
    )
    height: int | None = Field(None, ge=16, le=4096, description="Height of the clips in pixels. null: the family's default.")
    width: int | None = Field(None, ge=16, le=4096, description="Width of the clips in pixels. null: the family's default.")
    num_frames: int | None = Field(
        None, ge=1, le=2048, description="Number of pixel frames in one training window. null: the family's default."
    )
    fps: float | None = Field(
        None, gt=0, le=240, description="Clips are resampled to this frame rate. null: the family's default."
    )
    aspect_buckets: bool = Field(
        False,
        description="Keep each clip's aspect ratio: use the legal size nearest to it, with the same area as height x width.",
    )
    max_windows_per_clip: int = Field(
        0, ge=0, description="Largest number of windows of num_frames cut from one clip, spread evenly. 0: all that fit."
    )
    missing_captions: Literal["error", "empty", "filename", "skip"] = Field(
        "error",
        description="What to do with a clip without a caption: stop, take an empty one, take the file's name, or skip the clip.",
    )
    unusable_clips: Literal["error", "skip"] = Field(
        "error", description="What to do with a clip that can't be read or is too short: stop, or skip the clip."
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of the samples that are trained with the empty caption.")
    i2v_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples that are trained without the first frame. Only where task is i2v.",
    )
    cache_dir: PathText | None = Field(
        None,
        description="Folder for the encoded latents, captions and teacher features. null: ~/.cache/crepatrain.",
        json_schema_extra=_MAY_CHANGE,
    )
    dataloader_num_workers: int = Field(
        2, ge=0, le=64, description="Number of processes that read batches ahead of the training.", json_schema_extra=_MAY_CHANGE
    )


class DiffusionConfig(Section, frozen=True):
    """How the noise level of a sample is drawn, and the precision of the VAE."""

    model_config = ConfigDict(title="Diffusion")

    timestep_sampling: Literal["logit_normal", "uniform", "shifted"] = Field(
        "logit_normal",
        description="Distribution of the noise level s in training. shifted: uniform, then moved to k s / (1 + (k - 1) s), "
        "where k is flow_shift.",
    )
    logit_mean: float = Field(
        0.0, ge=-10, le=10, description="Mean of the normal distribution. Only where timestep_sampling is logit_normal."
    )
    logit_std: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Standard deviation of the normal distribution. Only where timestep_sampling is logit_normal.",
    )
    flow_shift: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Shift of the noise levels. Only where timestep_sampling is shifted. null: the checkpoint's own.",
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision in which the VAE encodes the clips.")


class OptimConfig(Section, frozen=True):
    """The optimizers and the learning rate."""

    model_config = ConfigDict(title="Optimizer")

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        "adamw", description="Optimizer of the trained weights and of CREPA's projector."
    )
    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate. Use 1.0 with prodigy.")
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="Decay of the average of the gradients. Only for adamw, adamw8bit and prodigy."
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="Decay of the average of the squared gradients. Only for adamw, adamw8bit and prodigy."
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="Added to the divisor of the update. Only for adamw, adamw8bit and prodigy."
    )
    adam_weight_decay: float = Field(0.01, ge=0, description="Weight decay. For every optimizer.")
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradients are clipped to this norm, those of the model and those of the projector separately. 0: never.",
    )
    use_ema: bool = Field(
        False, description="Keep an exponential moving average of the trained weights; the result is the average."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the moving average. Only with use_ema.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant_with_warmup", description="Learning-rate schedule, as diffusers defines it."
    )
    lr_warmup_steps: int = Field(
        0, ge=0, description="Number of optimizer steps in which the learning rate rises from 0. Not for the schedule constant."
    )


class LoopConfig(Section, frozen=True):
    """How long the run is, how large its steps are, and where it writes."""

    model_config = ConfigDict(title="Training run")

    output_dir: PathText = Field(description="The run's folder.")
    output_name: str = Field(
        "adapter",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="How the names of the files in adapters/ begin.",
        json_schema_extra=_MAY_CHANGE,
    )
    trigger_word: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Written into the adapter's header, for programs that show it to the user.",
        json_schema_extra=_MAY_CHANGE,
    )
    seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of the order of the data, the noise, the dropout and the new weights."
    )
    max_train_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the run in optimizer steps. Set either this or num_train_epochs.",
        json_schema_extra=_MAY_CHANGE,
    )
    num_train_epochs: int | None = Field(
        None,
        ge=1,
        description="Length of the run in passes over all windows. Set either this or max_train_steps.",
        json_schema_extra=_MAY_CHANGE,
    )
    train_batch_size: int = Field(1, ge=1, le=1024, description="Number of clips in one forward pass on one device.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="Number of forward passes in one optimizer step.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute the blocks in the backward pass: much less memory, a third more time."
    )
    compile: bool = Field(False, description="Compile the blocks with torch.compile. The first steps are slow.")
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Attention implementation by its name in diffusers, such as native, flash or sage. null: diffusers' default.",
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16",
        description="no: everything in fp32; bf16: frozen weights and arithmetic in bf16, trained weights in fp32.",
    )
    checkpointing_steps: int = Field(
        500, ge=1, description="Number of optimizer steps between two checkpoints.", json_schema_extra=_MAY_CHANGE
    )
    checkpoints_total_limit: int | None = Field(
        3,
        ge=1,
        description="How many of the newest checkpoints are kept. All adapters are kept. null: all checkpoints.",
        json_schema_extra=_MAY_CHANGE,
    )
    resume_from_checkpoint: str | None = Field(
        "latest",
        description="Where to continue: latest, or the name of a folder in checkpoints/. null: never continue.",
        json_schema_extra=_MAY_CHANGE,
    )
    logging_steps: int = Field(
        1, ge=1, description="Number of optimizer steps that one line in metrics.jsonl covers.", json_schema_extra=_MAY_CHANGE
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"],
        description="Where the logged lines are sent as well. tensorboard needs no further package.",
        json_schema_extra=_MAY_CHANGE,
    )


class ValidationConfig(Section, frozen=True):
    """Videos made during the run, and clips that are held out to measure the loss on."""

    model_config = ConfigDict(title="Validation")

    validation_prompts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="A video of each prompt is made before the first step, every validation_steps and at the end.",
        json_schema_extra=_MAY_CHANGE,
    )
    validation_images: Annotated[list[PathText], Field(min_length=1)] | None = Field(
        None,
        description="The first frame for each prompt: an image, or a clip whose first frame is used. Required with "
        "validation_prompts where task is i2v.",
        json_schema_extra=_MAY_CHANGE,
    )
    validation_steps: int = Field(
        500, ge=1, description="Number of optimizer steps between two rounds of validation videos.", json_schema_extra=_MAY_CHANGE
    )
    validation_seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of the noise, the same for every validation video.", json_schema_extra=_MAY_CHANGE
    )
    eval_data: PathText | None = Field(
        None,
        description="Clips that are never trained on; their loss is measured at every checkpoint.",
        json_schema_extra=_MAY_CHANGE,
    )
    eval_share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Instead of eval_data: share of the clips of train_data, chosen by their content, that is never trained on.",
    )
    validation_sampling_steps: int = Field(
        25, ge=2, le=1000, description="Number of denoising steps of a validation video.", json_schema_extra=_MAY_CHANGE
    )


class HubConfig(Section, frozen=True):
    """The Hugging Face hub. Only what a run has made is uploaded, never its clips; for a token use `hf auth login`."""

    model_config = ConfigDict(title="Hugging Face hub")

    push_to_hub: bool = Field(
        False, description="Upload the result with a model card when the run is complete.", json_schema_extra=_MAY_CHANGE
    )
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Repository on the hub, with or without its owner. null: the name of output_dir, under your own account.",
        json_schema_extra=_MAY_CHANGE,
    )
    hub_private_repo: bool = Field(
        True,
        description="Make a repository that does not exist yet private: only you can see it.",
        json_schema_extra=_MAY_CHANGE,
    )


class CrepaConfig(Section, frozen=True):
    """Cross-frame representation alignment (CREPA, arXiv 2506.09229), and when to stop it."""

    model_config = ConfigDict(title="CREPA")

    crepa_enabled: bool = Field(False, description="Train with CREPA.")
    crepa_block_index: int | None = Field(
        None, ge=0, description="Block whose hidden states are aligned, counted from 0. null: the family's default."
    )
    crepa_lambda: float = Field(0.5, ge=0, description="Weight of the alignment loss.")
    crepa_adjacent_distance: int = Field(
        1, ge=0, description="Distance d: frame f is aligned with frames f-d and f+d too. 0: with its own features only (REPA)."
    )
    crepa_adjacent_tau: float = Field(1.0, gt=0, description="A neighbour at distance k has the weight exp(-k / tau).")
    crepa_cumulative_neighbors: bool = Field(
        False, description="Use all neighbours up to crepa_adjacent_distance rather than only those at that distance."
    )
    crepa_spatial_align: bool = Field(True, description="Align patch with patch. false: align the means of whole frames only.")
    crepa_normalize_by_frames: bool = Field(True, description="Average the loss over the frames. false: sum it.")
    crepa_normalize_neighbour_sum: bool = Field(
        False, description="Divide the score of a frame by the sum of the weights of its neighbours and its own."
    )
    crepa_projector: Literal["linear", "conv"] = Field(
        "linear", description="Kind of projector. conv: a 3x3 convolution over the token grid (iREPA)."
    )
    crepa_projector_lr: float | None = Field(
        None, gt=0, le=10, description="Peak learning rate of the projector. null: learning_rate."
    )
    crepa_feature_source: Literal["cached", "pixels", "latents", "backbone"] = Field(
        "cached",
        description="Where the teacher's features come from. cached: the clips are encoded once; pixels: they are encoded in "
        "every step; latents: decoded latents are encoded in every step; backbone: a deeper block of the same transformer.",
    )
    crepa_use_backbone_features: bool = Field(False, description='true means the same as crepa_feature_source: "backbone".')
    crepa_teacher_block_index: int | None = Field(
        None, ge=0, description="Block that is the teacher. Required with backbone; must be deeper than crepa_block_index."
    )
    crepa_encoder: PathText = Field(
        "dinov2_vitg14",
        description="Vision encoder that is the teacher: dinov2_vit{s,b,l,g}14, the same with _reg at the end, or the folder or "
        "hub id of a vision transformer.",
        json_schema_extra=_MAY_CHANGE,
    )
    crepa_encoder_image_size: Annotated[int, Field(ge=14, le=4096)] | Literal["grid"] = Field(
        518,
        description="Size at which the encoder sees a frame. A number n: the frame is resized to n x n pixels; grid: one encoder "
        "patch per token, with the aspect ratio kept.",
    )
    crepa_encoder_frames_batch_size: int = Field(8, ge=1, description="Number of frames in one forward pass of the encoder.")
    crepa_cache_dtype: Literal["float16", "int8"] = Field(
        "float16",
        description="How cached features are stored. int8: with a scale per patch; half the disk space, and an error of the "
        "cosine of about 1e-3. Only where crepa_feature_source is cached.",
    )
    crepa_drop_vae_encoder: bool = Field(
        False, description="Free the memory of the VAE's encoder half. Only where crepa_feature_source is latents."
    )
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        "constant", description="How the weight decays from crepa_lambda to crepa_lambda_end."
    )
    crepa_warmup_steps: int = Field(0, ge=0, description="Number of optimizer steps of the rise from 0 to crepa_lambda.")
    crepa_decay_steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps of the decay, counted from the end of the warm-up. 0: the rest of the run.",
    )
    crepa_lambda_end: float = Field(0.0, ge=0, description="Weight at the end of the decay.")
    crepa_power: float = Field(1.0, gt=0, description="Power of the polynomial decay. Only where crepa_scheduler is polynomial.")
    crepa_cutoff_step: int = Field(0, ge=0, description="Turn CREPA off from this optimizer step on. 0: never.")
    crepa_similarity_threshold: float | None = Field(
        None, description="Turn CREPA off when the moving average of the score reaches this value. null: never."
    )
    crepa_similarity_ema_decay: float = Field(
        0.99, ge=0, lt=1, description="Decay of the score's moving average, which begins with the first score."
    )
    crepa_threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent",
        description="permanent: once off at the threshold, off for good; recoverable: on again when the average is below it.",
    )
    crepa_threshold_metric: Literal["alignment", "self"] = Field(
        "alignment",
        description="Which score is averaged. alignment: that of the loss, with the neighbours; self: that of each frame with "
        "its own features.",
    )
    crepa_probe_interval: int = Field(
        10,
        ge=1,
        description="Number of steps between two measurements of the score while CREPA is off. Only where crepa_threshold_mode "
        "is recoverable.",
    )


class LayerSyncConfig(Section, frozen=True):
    """LayerSync (arXiv 2510.12581): a block is aligned with a deeper block of the same transformer."""

    model_config = ConfigDict(title="LayerSync")

    layersync_enabled: bool = Field(False, description="Train with LayerSync.")
    layersync_student_block: int | None = Field(
        None, ge=0, description="Block that is aligned, counted from 0. Required with layersync_enabled."
    )
    layersync_teacher_block: int | None = Field(
        None,
        ge=0,
        description="Block that is the teacher. Required with layersync_enabled; must be deeper than layersync_student_block.",
    )
    layersync_lambda: float = Field(0.2, ge=0, description="Weight of the LayerSync loss.")
