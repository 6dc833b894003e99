"""The keys of a config that say what is trained on."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from crepatrain.config.fields import IF_ALLOWED, MAY_CHANGE, ClipMode, PathText, Section, Size


class DataConfig(Section, frozen=True):
    """The clips and how they are cut into training windows."""

    model_config = ConfigDict(title="Data")

    train_data: PathText | Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="Folder of videos with captions in NAME.txt files; a .jsonl, .csv or .json list of videos and captions; or "
        "several datasets, as a list of entries with a path each, here or in a .yaml, .toml or .json file.",
        json_schema_extra=MAY_CHANGE,
    )
    height: int | None = Field(None, ge=16, le=4096, description="Height of the clips in pixels. null: the family's default.")
    width: int | None = Field(None, ge=16, le=4096, description="Width of the clips in pixels. null: the family's default.")
    num_frames: int | None = Field(
        None, ge=1, le=2048, description="Number of pixel frames in one training window. null: the family's default."
    )
    fps: Annotated[float, Field(gt=0, le=240)] | Literal["keep"] | None = Field(
        None, description="Clips are resampled to this frame rate. keep: every frame as it is. null: the family's default."
    )
    aspect_buckets: bool | Annotated[list[Size], Field(min_length=1)] = Field(
        False,
        description="Keep each clip's aspect ratio: use the legal size nearest to it, with the same area as height x width. Or a "
        "list of [height, width], of which each clip takes the one nearest to its shape.",
    )
    frame_buckets: Literal["auto"] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = Field(
        None,
        description="How many frames a window may have: a list, of which each clip takes the largest that it fills; auto: as "
        "many as the model takes and the clip fills. num_frames is the most in any case. null: num_frames.",
    )
    clip_mode: ClipMode = Field(
        "chunks",
        description="Which windows a clip is cut into. chunks: one after the other; first, middle: one; uniform: "
        "max_windows_per_clip of them, spread over all of the clip; slide: each begins half a window after the one before; "
        "random: at places drawn by seed.",
        json_schema_extra=IF_ALLOWED,
    )
    max_windows_per_clip: int = Field(
        0,
        ge=0,
        description="Largest number of windows cut from one clip, spread evenly. 0: all that fit.",
        json_schema_extra=IF_ALLOWED,
    )
    crop: Literal["center", "random", "none"] = Field(
        "center",
        description="Which part of a picture of another shape is used: the middle one; one at a place drawn by seed for each "
        "window; or none is left out, and the picture is squeezed.",
        json_schema_extra=IF_ALLOWED,
    )
    missing_captions: Literal["error", "empty", "filename", "skip"] = Field(
        "error",
        description="What to do with a clip without a caption: stop, take an empty one, take the file's name, or skip the clip.",
        json_schema_extra=IF_ALLOWED,
    )
    unusable_clips: Literal["error", "skip"] = Field(
        "error",
        description="What to do with a clip that can't be read or is too short: stop, or skip the clip.",
        json_schema_extra=IF_ALLOWED,
    )
    caption_prefix: str = Field(
        "",
        max_length=2000,
        description="Text before the caption of every clip, as it is written here: end it in a space. The empty caption of "
        "caption_dropout stays empty, and prompts are used as they are.",
        json_schema_extra=IF_ALLOWED,
    )
    caption_suffix: str = Field(
        "",
        max_length=2000,
        description="Text after the caption of every clip, as it is written here: begin it with a space or a comma.",
        json_schema_extra=IF_ALLOWED,
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of the samples that are trained with the empty caption.", json_schema_extra=IF_ALLOWED
    )
    i2v_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples that are trained without the first frame. Only where task is i2v.",
        json_schema_extra=IF_ALLOWED,
    )
    cache_dir: PathText | None = Field(
        None,
        description="Folder for the encoded latents, captions and teacher features. null: ~/.cache/crepatrain.",
        json_schema_extra=MAY_CHANGE,
    )
    dataloader_num_workers: int = Field(
        2, ge=0, le=64, description="Number of processes that read batches ahead of the training.", json_schema_extra=MAY_CHANGE
    )
