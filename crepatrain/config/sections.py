"""Every key of a config but those of the alignment and of the data, in the section of the part of the program that needs it."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from crepatrain.config.fields import (
    IF_ALLOWED,
    LONGEST_OUTPUT_NAME,
    MAY_CHANGE,
    FamilyName,
    LoraTargets,
    PathText,
    Quantization,
    Section,
    TextQuantization,
)


class ModelConfig(Section, frozen=True):
    """Which model is trained, and where it comes from."""

    model_config = ConfigDict(title="Model")

    model_family: FamilyName = Field(description="Family of the model; `crepatrain families` lists them.")
    pretrained_model_name_or_path: PathText = Field(
        description="Folder of a diffusers pipeline, or its hub id.", json_schema_extra=MAY_CHANGE
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
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.", json_schema_extra=IF_ALLOWED)
    lora_use_rslora: bool = Field(
        False, description="Scale the adapter by lora_alpha / sqrt(lora_rank) instead (rank-stabilized LoRA)."
    )
    init_adapter: PathText | None = Field(
        None,
        description="Begin with the weights of this adapter file, which must have the same rank and layers.",
        json_schema_extra=MAY_CHANGE,
    )
    lora_targets: LoraTargets | None = Field(
        None,
        description="Which layers are adapted: a list of the ends of their names, a regex that matches whole names, or "
        "all-linear. null: the family's default.",
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
    vae_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision in which the VAE encodes the clips, and decodes a run's videos."
    )
    vae_tiling: bool = Field(
        False,
        description="Let the VAE encode and decode in overlapping tiles, which are blended: less memory for large frames, and "
        "slightly other latents.",
    )


class OptimConfig(Section, frozen=True):
    """The optimizers and the learning rate."""

    model_config = ConfigDict(title="Optimizer")

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        "adamw",
        description="Optimizer of the trained weights and of CREPA's projector. With adamw and adafactor no step waits for the "
        "GPU; with adamw8bit each waits once, and with prodigy several times.",
    )
    learning_rate: float = Field(
        1e-4, gt=0, le=10, description="Peak learning rate. Use 1.0 with prodigy.", json_schema_extra=IF_ALLOWED
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="Decay of the average of the gradients. Only for adamw, adamw8bit and prodigy."
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="Decay of the average of the squared gradients. Only for adamw, adamw8bit and prodigy."
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="Added to the divisor of the update. Only for adamw, adamw8bit and prodigy."
    )
    adam_weight_decay: float = Field(0.01, ge=0, description="Weight decay. For every optimizer.", json_schema_extra=IF_ALLOWED)
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradients are clipped to this norm, those of the model and those of the projector separately. 0: never.",
        json_schema_extra=IF_ALLOWED,
    )
    use_ema: bool = Field(
        False, description="Keep an exponential moving average of the trained weights; the result is the average."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the moving average. Only with use_ema.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant_with_warmup", description="Learning-rate schedule, as diffusers defines it.", json_schema_extra=IF_ALLOWED
    )
    lr_warmup_steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps in which the learning rate rises from 0. Not for the schedule constant.",
        json_schema_extra=IF_ALLOWED,
    )


class LoopConfig(Section, frozen=True):
    """How long the run is, how large its steps are, and where it writes."""

    model_config = ConfigDict(title="Training run")

    output_dir: PathText = Field(description="The run's folder.")
    output_name: str = Field(
        "adapter",
        max_length=LONGEST_OUTPUT_NAME,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="How the names of the files in adapters/ begin.",
        json_schema_extra=MAY_CHANGE,
    )
    trigger_word: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Written into the adapter's header, for programs that show it to the user. It is put into captions by "
        "caption_prefix alone.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of the order of the data, the noise, the dropout and the new weights."
    )
    max_train_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the run in optimizer steps. Set either this or num_train_epochs.",
        json_schema_extra=MAY_CHANGE,
    )
    num_train_epochs: int | None = Field(
        None,
        ge=1,
        description="Length of the run in passes over all windows. Set either this or max_train_steps.",
        json_schema_extra=MAY_CHANGE,
    )
    train_batch_size: int = Field(1, ge=1, le=1024, description="Number of clips in one forward pass on one device.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="Number of forward passes in one optimizer step.")
    memory: Literal["manual", "auto"] = Field(
        "manual",
        description="With auto, gradient_checkpointing, block_offload, checkpoint_offload, nested_checkpointing and "
        "base_quantization are chosen for the GPU at hand where they are not set: by the estimate, what costs the least time of "
        "what fits.",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        True,
        description="Compute the blocks again in the backward pass: much less memory, a third more time. selective: keep what "
        "attention among a clip's tokens gives and compute the rest again: less time than true where clips are long, for one "
        "tensor of the size of the hidden states more for every block.",
        json_schema_extra=IF_ALLOWED,
    )
    checkpoint_offload: bool = Field(
        False,
        description="Keep the hidden states that gradient checkpointing needs of every block in pinned host memory from its "
        "forward to its backward, copied beside the work. The numbers of a run stay the same to the bit. Needs "
        "gradient_checkpointing.",
        json_schema_extra=MAY_CHANGE,
    )
    nested_checkpointing: bool = Field(
        False,
        description="When a block is computed again, compute its self-attention, cross-attention and feed-forward once more, "
        "each where its own backward begins: less memory within a block, for as much more time as gradient_checkpointing costs. "
        "The numbers of a run stay the same to the bit. Only where gradient_checkpointing is true.",
        json_schema_extra=MAY_CHANGE,
    )
    block_offload: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="Number of blocks whose frozen weights live in pinned host memory and are copied to the GPU ahead of their "
        "use; two of them are on the GPU at any time. The numbers of a run stay the same to the bit. auto: the smallest number "
        "that fits the GPU at hand, by the estimate. Needs gradient_checkpointing, and model_type lora.",
        json_schema_extra=MAY_CHANGE,
    )
    compile: bool = Field(
        False, description="Compile the blocks with torch.compile. The first steps are slow.", json_schema_extra=IF_ALLOWED
    )
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Attention kernel by its name in diffusers: native, _native_cudnn, flash, _flash_3 or xformers. It is used "
        "where an attention has no mask, and must have a backward. null: native.",
        json_schema_extra=IF_ALLOWED,
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16",
        description="no: everything in fp32; bf16: frozen weights and arithmetic in bf16, trained weights in fp32.",
    )
    base_quantization: Quantization = Field(
        "none",
        description="Keep the weights of the frozen blocks in fewer bits and compute as mixed_precision says: int8 halves their "
        "memory at hardly any error, fp8 at a larger one; nf4 (bitsandbytes) leaves less than a third, at the largest. For an "
        "adapter alone.",
    )
    text_encoder_offload: bool | Literal["auto"] = Field(
        "auto",
        description="Leave the weights of the text encoder's blocks in host memory and copy each block to the GPU ahead of its "
        "use; the captions stay the same to the bit. auto: where the weights do not fit into three quarters of the GPU's free "
        "memory.",
        json_schema_extra=MAY_CHANGE,
    )
    text_encoder_quantization: TextQuantization = Field(
        "none",
        description="Keep the weights of the text encoder's blocks in fewer bits: int8 at a small error of the encoded captions, "
        "nf4 (bitsandbytes) at a larger one. text_encoder_offload needs less memory, at no error.",
    )
    checkpointing_steps: int = Field(
        500, ge=1, description="Number of optimizer steps between two checkpoints.", json_schema_extra=MAY_CHANGE
    )
    checkpoints_total_limit: int | None = Field(
        3,
        ge=1,
        description="How many of the newest checkpoints are kept. All adapters are kept. null: all checkpoints.",
        json_schema_extra=MAY_CHANGE,
    )
    resume_from_checkpoint: str | None = Field(
        "latest",
        description="Where to continue: latest, the name of a folder in checkpoints/, or the path of such a folder. null: never "
        "continue; what a run whose checkpoints are lost has left is then set aside.",
        json_schema_extra=MAY_CHANGE,
    )
    allow_changes: list[str] = Field(
        [],
        description="Keys in which this run may differ from what its folder holds when it continues, such as learning_rate. "
        "train_data: its clips and captions.",
        json_schema_extra=MAY_CHANGE,
    )
    logging_steps: int = Field(
        1, ge=1, description="Number of optimizer steps that one line in metrics.jsonl covers.", json_schema_extra=MAY_CHANGE
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"],
        description="Where the logged lines are sent as well. tensorboard needs no further package.",
        json_schema_extra=MAY_CHANGE,
    )


class ValidationConfig(Section, frozen=True):
    """Videos made during the run, and clips that are held out to measure the loss on."""

    model_config = ConfigDict(title="Validation")

    validation_prompts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="A video of each prompt is made before the first step, every validation_steps and at the end.",
        json_schema_extra=MAY_CHANGE,
    )
    validation_images: Annotated[list[PathText], Field(min_length=1)] | None = Field(
        None,
        description="The first frame for each prompt: an image, or a clip whose first frame is used. Required with "
        "validation_prompts where task is i2v.",
        json_schema_extra=MAY_CHANGE,
    )
    validation_steps: int = Field(
        500, ge=1, description="Number of optimizer steps between two rounds of validation videos.", json_schema_extra=MAY_CHANGE
    )
    validation_seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of the noise, the same for every validation video.", json_schema_extra=MAY_CHANGE
    )
    eval_data: PathText | None = Field(
        None,
        description="Clips that are never trained on; their loss is measured at every checkpoint.",
        json_schema_extra=MAY_CHANGE,
    )
    eval_share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Instead of eval_data: share of the clips of train_data, chosen by their content, that is never trained on.",
    )
    eval_seed: int = Field(
        42,
        ge=0,
        lt=2**31,
        description="Seed of the noise on held-out clips, so that their losses compare between runs of different seed.",
    )
    validation_sampling_steps: int = Field(
        25, ge=2, le=1000, description="Number of denoising steps of a validation video.", json_schema_extra=MAY_CHANGE
    )


class HubConfig(Section, frozen=True):
    """The Hugging Face hub. Only what a run has made is uploaded, never its clips; for a token use `hf auth login`."""

    model_config = ConfigDict(title="Hugging Face hub")

    push_to_hub: bool = Field(
        False, description="Upload the result with a model card when the run is complete.", json_schema_extra=MAY_CHANGE
    )
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Repository on the hub, with or without its owner. null: the name of output_dir, under your own account.",
        json_schema_extra=MAY_CHANGE,
    )
    hub_private_repo: bool = Field(
        True,
        description="Make a repository that does not exist yet private: only you can see it.",
        json_schema_extra=MAY_CHANGE,
    )
