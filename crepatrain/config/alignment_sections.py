"""Every key of CREPA and of LayerSync with its default, range and meaning."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from crepatrain.config.fields import IF_ALLOWED, MAY_CHANGE, PathText, Section


class CrepaConfig(Section, frozen=True):
    """Cross-frame representation alignment (CREPA, arXiv 2506.09229), and when to stop it."""

    model_config = ConfigDict(title="CREPA")

    crepa_enabled: bool = Field(False, title="Enable CREPA", description="Train with CREPA.")
    crepa_block_index: int | None = Field(
        None,
        title="CREPA Block Index",
        ge=0,
        description="Block whose hidden states are aligned, counted from 0. null: the family's default.",
    )
    crepa_lambda: float = Field(
        0.5, title="Weight", ge=0, description="Weight of the alignment loss.", json_schema_extra=IF_ALLOWED
    )
    crepa_adjacent_distance: int = Field(
        1,
        title="Adjacent Distance",
        ge=0,
        description="Distance d: frame f is aligned with frames f-d and f+d too. 0: with its own features only (REPA).",
    )
    crepa_adjacent_tau: float = Field(
        1.0, title="Temporal Decay", gt=0, description="A neighbour at distance k has the weight exp(-k / tau)."
    )
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
        None, gt=0, le=10, description="Peak learning rate of the projector. null: learning_rate.", json_schema_extra=IF_ALLOWED
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
        json_schema_extra=MAY_CHANGE,
    )
    crepa_encoder_image_size: Annotated[int, Field(ge=14, le=4096)] | Literal["grid"] = Field(
        518,
        description="Size at which the encoder sees a frame. A number n: the frame is resized to n x n pixels; grid: one encoder "
        "patch per token, with the aspect ratio kept.",
    )
    crepa_encoder_frames_batch_size: int = Field(
        8, ge=1, description="Number of frames in one forward pass of the encoder.", json_schema_extra=IF_ALLOWED
    )
    crepa_cache_dtype: Literal["float16", "int8"] = Field(
        "float16",
        description="How cached features are stored. int8: with a scale per patch; half the disk space, and an error of the "
        "cosine of about 1e-3. Only where crepa_feature_source is cached.",
    )
    crepa_drop_vae_encoder: bool = Field(
        False, description="Free the memory of the VAE's encoder half. Only where crepa_feature_source is latents."
    )
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        "constant", description="How the weight decays from crepa_lambda to crepa_lambda_end.", json_schema_extra=IF_ALLOWED
    )
    crepa_warmup_steps: int = Field(
        0, ge=0, description="Number of optimizer steps of the rise from 0 to crepa_lambda.", json_schema_extra=IF_ALLOWED
    )
    crepa_decay_steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps of the decay, counted from the end of the warm-up. 0: the rest of the run.",
        json_schema_extra=IF_ALLOWED,
    )
    crepa_lambda_end: float = Field(
        0.0, title="Weight at the end", ge=0, description="Weight at the end of the decay.", json_schema_extra=IF_ALLOWED
    )
    crepa_power: float = Field(
        1.0,
        gt=0,
        description="Power of the polynomial decay. Only where crepa_scheduler is polynomial.",
        json_schema_extra=IF_ALLOWED,
    )
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

    layersync_enabled: bool = Field(False, title="Enable LayerSync", description="Train with LayerSync.")
    layersync_student_block: int | None = Field(
        None, ge=0, description="Block that is aligned, counted from 0. Required with layersync_enabled."
    )
    layersync_teacher_block: int | None = Field(
        None,
        ge=0,
        description="Block that is the teacher. Required with layersync_enabled; must be deeper than layersync_student_block.",
    )
    layersync_lambda: float = Field(
        0.2, title="LayerSync weight", ge=0, description="Weight of the LayerSync loss.", json_schema_extra=IF_ALLOWED
    )
