"""Every key of a config with its default, range and meaning.

A section is what one part of the program asks for; RunConfig is all of them, flat.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from crepatrain.specs import FAMILIES

# A run may go on after such a key was changed: it alters how the run is watched, how long it is, or where things lie. What lies
# there is held against the checkpoint's fingerprint.
_MAY_CHANGE: dict[str, Any] = {"may_change": True}


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise PydanticCustomError("literal_error", "unknown family", {"expected": ", ".join(map(repr, FAMILIES))})
    return name


FamilyName = Annotated[str, AfterValidator(_known_family), WithJsonSchema({"type": "string", "enum": list(FAMILIES)})]


def _possible_path(text: str) -> str:
    """A path that the system can take, with ~ expanded."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - a hub id is no path, and stays as it is
    if "\0" in expanded or len(expanded) > 4000 or any(len(os.fsencode(part)) > 255 for part in expanded.split("/")):
        raise PydanticCustomError("impossible_path", "no system has such a path")
    return expanded


PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible_path)]


def _possible_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise PydanticCustomError("impossible_regex", "{reason}", {"reason": str(error)}) from error
    return text


LoraTargets = (
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    | Literal["all-linear"]
    | Annotated[str, Field(min_length=1), AfterValidator(_possible_regex)]
)


class Section(BaseModel):
    """One part of the config: unknown keys are errors, values are taken as they are written, never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model is trained, and where it comes from."""

    model_family: FamilyName = Field(description="DiT family: see `crepatrain families`")
    pretrained_model_name_or_path: PathText = Field(
        description="diffusers pipeline folder or hub id", json_schema_extra=_MAY_CHANGE
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    model_type: Literal["lora", "full"] = Field("lora", description="what is trained: an adapter, or every weight")
    task: Literal["t2v", "i2v"] | None = Field(
        None, description="from text alone, or from text and the clip's first frame; null: what the checkpoint is for"
    )
    wan_expert: Literal["high", "low"] | None = Field(
        None, description="of Wan 2.2 A14B: the transformer of high or of low noise; required there"
    )


class LoraConfig(Section):
    """The adapter."""

    lora_rank: int = Field(32, ge=1, le=4096, description="rank r of every adapted layer")
    lora_alpha: float | None = Field(None, gt=0, description="the adapter is scaled by lora_alpha / lora_rank; null: lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    lora_use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(lora_rank) instead (rsLoRA)")
    init_adapter: PathText | None = Field(
        None,
        description="begin with the weights of this adapter file, of the same rank and layers",
        json_schema_extra=_MAY_CHANGE,
    )
    lora_targets: LoraTargets | None = Field(
        None,
        description="ends of the adapted layers' names, a regex of whole names, or all-linear; null: the family's",
    )


class DataConfig(Section):
    """The clips and how they are cut."""

    train_data: PathText = Field(
        description="folder of videos with NAME.txt captions, or a .jsonl/.csv of video and caption",
        json_schema_extra=_MAY_CHANGE,
    )
    height: int | None = Field(None, ge=16, le=4096, description="pixels; null: the family's")
    width: int | None = Field(None, ge=16, le=4096, description="pixels; null: the family's")
    num_frames: int | None = Field(None, ge=1, le=2048, description="pixel frames of one training window; null: the family's")
    fps: float | None = Field(None, gt=0, le=240, description="clips are resampled to it; null: the family's")
    aspect_buckets: bool = Field(
        False, description="keep each clip's aspect ratio: the legal size of the same area nearest to it"
    )
    max_windows_per_clip: int = Field(
        0, ge=0, description="windows of num_frames cut from one clip, spread evenly; 0: all that fit"
    )
    missing_captions: Literal["error", "empty", "filename", "skip"] = Field(
        "error", description="what to do with a clip without a caption"
    )
    unusable_clips: Literal["error", "skip"] = Field(
        "error", description="what to do with a clip that is unreadable or too short"
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples trained with the empty caption")
    i2v_dropout: float = Field(0.0, ge=0, le=1, description="of i2v: share of samples trained without the first frame")
    cache_dir: PathText | None = Field(
        None,
        description="latents, text and teacher features; null: ~/.cache/crepatrain",
        json_schema_extra=_MAY_CHANGE,
    )
    dataloader_num_workers: int = Field(
        2, ge=0, le=64, description="processes that read batches ahead", json_schema_extra=_MAY_CHANGE
    )


class DiffusionConfig(Section):
    """How the noise level of a sample is drawn, and the precision of the VAE."""

    timestep_sampling: Literal["logit_normal", "uniform", "shifted"] = Field(
        "logit_normal", description="shifted: uniform, then s -> k s / (1 + (k - 1) s) with k = flow_shift"
    )
    logit_mean: float = Field(0.0, ge=-10, le=10, description="of logit_normal")
    logit_std: float = Field(1.0, gt=0, le=10, description="of logit_normal")
    flow_shift: float | None = Field(None, gt=0, le=100, description="of shifted; null: the checkpoint's scheduler's")
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision in which the VAE encodes")


class OptimConfig(Section):
    """The optimizers and the learning rate."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        "adamw", description="of the adapter and of the projector"
    )
    learning_rate: float = Field(1e-4, gt=0, le=10, description="peak learning rate (prodigy: 1.0)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of adamw, adamw8bit, prodigy")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="of adamw, adamw8bit, prodigy")
    adam_epsilon: float = Field(1e-8, gt=0, description="of adamw, adamw8bit, prodigy")
    adam_weight_decay: float = Field(0.01, ge=0, description="of every optimizer")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it, adapter and projector apart; 0: never")
    use_ema: bool = Field(False, description="average the trained weights over the steps; the result is the average")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of use_ema")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant_with_warmup", description="diffusers' schedules"
    )
    lr_warmup_steps: int = Field(0, ge=0, description="optimizer steps")


class LoopConfig(Section):
    """The loop: how long, how large, where to."""

    output_dir: PathText = Field(description="the run's folder")
    output_name: str = Field(
        "adapter",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="of the files in adapters/",
        json_schema_extra=_MAY_CHANGE,
    )
    trigger_word: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="told in the adapter's header, for programs that show it",
        json_schema_extra=_MAY_CHANGE,
    )
    seed: int = Field(42, ge=0, lt=2**31, description="of data order, noise, dropout and new weights")
    max_train_steps: int | None = Field(
        None, ge=1, description="optimizer steps; or num_train_epochs", json_schema_extra=_MAY_CHANGE
    )
    num_train_epochs: int | None = Field(
        None, ge=1, description="passes over the windows; or max_train_steps", json_schema_extra=_MAY_CHANGE
    )
    train_batch_size: int = Field(1, ge=1, le=1024, description="clips of one forward on one device")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="forwards of one optimizer step")
    gradient_checkpointing: bool = Field(
        True, description="recompute the blocks in backward: much less memory, a third more time"
    )
    compile: bool = Field(False, description="compile the blocks with torch.compile; the first steps are slow")
    attention_backend: str | None = Field(
        None, min_length=1, description="of diffusers, such as native, flash, sage; null: its default"
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16", description="bf16: frozen weights in bf16, adapter and projector in fp32"
    )
    checkpointing_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints", json_schema_extra=_MAY_CHANGE)
    checkpoints_total_limit: int | None = Field(
        3, ge=1, description="checkpoints kept; adapters are all kept", json_schema_extra=_MAY_CHANGE
    )
    resume_from_checkpoint: str | None = Field(
        "latest", description="latest, a folder in checkpoints/, or null: never", json_schema_extra=_MAY_CHANGE
    )
    logging_steps: int = Field(1, ge=1, description="optimizer steps of one line in metrics.jsonl", json_schema_extra=_MAY_CHANGE)
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"], description="where logged lines go too; event files need no package", json_schema_extra=_MAY_CHANGE
    )


class ValidationConfig(Section):
    """What is looked at on the way: videos, and clips that are not trained on."""

    validation_prompts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="a video of each before the first step, every validation_steps and at the end",
        json_schema_extra=_MAY_CHANGE,
    )
    validation_images: Annotated[list[PathText], Field(min_length=1)] | None = Field(
        None, description="of i2v: the first frame for each prompt, an image or a clip", json_schema_extra=_MAY_CHANGE
    )
    validation_steps: int = Field(500, ge=1, description="optimizer steps between them", json_schema_extra=_MAY_CHANGE)
    validation_seed: int = Field(42, ge=0, lt=2**31, description="the same for every video", json_schema_extra=_MAY_CHANGE)
    eval_data: PathText | None = Field(
        None,
        description="clips that are never trained on; their loss is taken at every checkpoint",
        json_schema_extra=_MAY_CHANGE,
    )
    eval_share: float = Field(0.0, ge=0, le=0.5, description="or a share of the clips, chosen by their content, held out")
    validation_sampling_steps: int = Field(25, ge=2, le=1000, description="denoising steps", json_schema_extra=_MAY_CHANGE)


class HubConfig(Section):
    """The Hugging Face hub, which only sees what a run has made, never its clips. A token is never a key: `hf auth login`."""

    push_to_hub: bool = Field(
        False, description="upload the result with a model card when the run is complete", json_schema_extra=_MAY_CHANGE
    )
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="repository, with or without its owner; null: the name of output_dir, under your own name",
        json_schema_extra=_MAY_CHANGE,
    )
    hub_private_repo: bool = Field(
        True, description="of a repository that does not exist yet: seen by you alone", json_schema_extra=_MAY_CHANGE
    )


class CrepaConfig(Section):
    """CREPA, as arXiv 2506.09229 has it, and when to stop it."""

    crepa_enabled: bool = Field(False, description="train with CREPA")
    crepa_block_index: int | None = Field(
        None, ge=0, description="block whose hidden states are aligned, from 0; null: the family's"
    )
    crepa_lambda: float = Field(0.5, ge=0, description="weight of the alignment loss")
    crepa_adjacent_distance: int = Field(1, ge=0, description="d: neighbours at f-d and f+d; 0: per-frame REPA")
    crepa_adjacent_tau: float = Field(1.0, gt=0, description="a neighbour at distance k weighs exp(-k / tau)")
    crepa_cumulative_neighbors: bool = Field(False, description="all neighbours up to d rather than those at d")
    crepa_spatial_align: bool = Field(True, description="patch on patch; false: frame means only")
    crepa_normalize_by_frames: bool = Field(True, description="mean over frames; false: sum")
    crepa_normalize_neighbour_sum: bool = Field(False, description="divide a frame's score by the sum of its weights")
    crepa_projector: Literal["linear", "conv"] = Field("linear", description="conv: 3x3 over the token grid (iREPA)")
    crepa_projector_lr: float | None = Field(None, gt=0, le=10, description="null: learning_rate")
    crepa_feature_source: Literal["cached", "pixels", "latents", "backbone"] = Field(
        "cached", description="cached: encoded once per clip; pixels, latents: in every step; backbone: a deeper block"
    )
    crepa_use_backbone_features: bool = Field(False, description='the same as crepa_feature_source: "backbone"')
    crepa_teacher_block_index: int | None = Field(None, ge=0, description="of backbone; deeper than crepa_block_index")
    crepa_encoder: PathText = Field(
        "dinov2_vitg14",
        description="dinov2_vit{s,b,l,g}14[_reg], or a ViT's folder or hub id",
        json_schema_extra=_MAY_CHANGE,
    )
    crepa_encoder_image_size: Annotated[int, Field(ge=14, le=4096)] | Literal["grid"] = Field(
        518, description="n: frames squashed to n x n; grid: one encoder patch per token, aspect kept"
    )
    crepa_encoder_frames_batch_size: int = Field(8, ge=1, description="frames of one encoder forward")
    crepa_cache_dtype: Literal["float16", "int8"] = Field(
        "float16",
        description="of cached: int8, with a scale per patch, takes half the disk for an error of the cosine of about 1e-3",
    )
    crepa_drop_vae_encoder: bool = Field(False, description="of latents: free the VAE's encoder half")
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field("constant", description="decay of the weight")
    crepa_warmup_steps: int = Field(0, ge=0, description="optimizer steps from 0 to crepa_lambda")
    crepa_decay_steps: int = Field(
        0, ge=0, description="optimizer steps of the decay, from the end of the warm-up; 0: the rest of the run"
    )
    crepa_lambda_end: float = Field(0.0, ge=0, description="weight at the end of the decay")
    crepa_power: float = Field(1.0, gt=0, description="of polynomial")
    crepa_cutoff_step: int = Field(0, ge=0, description="off from this optimizer step on; 0: never")
    crepa_similarity_threshold: float | None = Field(None, description="off when the score's EMA reaches it; null: never")
    crepa_similarity_ema_decay: float = Field(0.99, ge=0, lt=1, description="of the EMA; its first value is the first score")
    crepa_threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent", description="recoverable: on again below the threshold"
    )
    crepa_threshold_metric: Literal["alignment", "self"] = Field(
        "alignment", description="score of the EMA: with neighbours, or the frame's own"
    )
    crepa_probe_interval: int = Field(10, ge=1, description="of recoverable: steps between measurements while off")


class LayerSyncConfig(Section):
    """LayerSync (arXiv 2510.12581), which shares CREPA's captured states."""

    layersync_enabled: bool = Field(False, description="align a block with a deeper one")
    layersync_student_block: int | None = Field(None, ge=0, description="required where it is enabled")
    layersync_teacher_block: int | None = Field(None, ge=0, description="deeper than the student's")
    layersync_lambda: float = Field(0.2, ge=0, description="weight of its loss")


SECTIONS: tuple[type[Section], ...] = (
    ModelConfig,
    DataConfig,
    LoraConfig,
    DiffusionConfig,
    OptimConfig,
    LoopConfig,
    ValidationConfig,
    HubConfig,
    CrepaConfig,
    LayerSyncConfig,
)


class RunConfig(
    ModelConfig,
    DataConfig,
    LoraConfig,
    DiffusionConfig,
    OptimConfig,
    LoopConfig,
    ValidationConfig,
    HubConfig,
    CrepaConfig,
    LayerSyncConfig,
):
    """A whole run, as one flat object."""

    @classmethod
    def may_change(cls, key: str) -> bool:
        """Whether a run may go on after this key was changed."""
        extra = cls.model_fields[key].json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("may_change"))
