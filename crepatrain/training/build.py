"""From a plan to the modules of a run."""

import contextlib
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.encoders import VisionEncoder, load_encoder
from crepatrain.alignment.teachers import BackboneTeacher, CachedTeacher, LatentTeacher, PixelTeacher, Teacher
from crepatrain.config.plan import Plan
from crepatrain.config.resolved import ResolvedCrepa, ResolvedLayerSync
from crepatrain.config.sources import BASE_KEY, expect_parts, fetch, local_folder
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.families.autoencoders import tile_vae
from crepatrain.families.base import CutCaption, Family
from crepatrain.placement.precision import encoding_dtype, weights_dtype
from crepatrain.placement.quantizing import load_quantized, quantize_blocks
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.loading import loading
from crepatrain.training.lora import add_configured_lora, leave_casts_to_autocast
from crepatrain.training.step import CrepaForward, CrepaTerm, LayerSyncTerm
from crepatrain.training.text_encoders import TextEncoding

_ENCODER_FILES = ("*.json", "*.safetensors")
_ADDED_TOKENS = 16  # at most, by a tokenizer or a template, to a caption


def model_folder(plan: Plan) -> Path:
    """The checkpoint's local folder, downloaded where it is on the hub."""
    patterns = ("model_index.json", *(f"{part}/*" for part in plan.variant.parts))
    key, path = BASE_KEY, plan.config.model.pretrained_model_name_or_path
    folder = fetch(key, path, plan.config.model.revision, patterns)
    expect_parts(key, folder, plan.variant.parts, plan.variant.weights)  # offline, the hub's cache may hold only some of them
    return folder


def build_family(plan: Plan) -> Family:
    """The family as the plan's checkpoint and task are."""
    return get_family(plan.config.model.model_family, plan.checkpoint, task=plan.task, expert=plan.config.model.wan_expert)


def count_caption_tokens(plan: Plan, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, of a family whose batches hold captions of one length alone."""
    folder = _fetch_tokenizers(plan)
    with loading(folder, plan.variant.folders("tokenizer")):
        return build_family(plan).count_tokens(str(folder), captions)


def cut_captions(plan: Plan, captions: Sequence[str], *, download: bool) -> list[CutCaption | None] | None:
    """Of each caption whether it is longer than the text encoder reads.

    Args:
        download: whether the tokenizers may be downloaded.

    Returns:
        None where the tokenizers are needed, are not on this machine, and may not be downloaded.
    """
    tokenizers, limit = plan.variant.folders("tokenizer"), plan.spec.text_length_of(plan.variant)
    # A token stands for a byte at least, and the tokenizer adds a few of its own: most captions need no count.
    long = [caption for caption in captions if len(unicodedata.normalize("NFKC", caption).encode()) > limit - _ADDED_TOKENS]
    if not long:
        return [None for _ in captions]
    model = plan.config.model
    folder = _fetch_tokenizers(plan) if download else local_folder(model.pretrained_model_name_or_path, model.revision)
    if folder is None or not all(any((folder / part).glob("*.json")) for part in tokenizers):
        return None
    with loading(folder, tokenizers):
        cut = dict(zip(long, build_family(plan).cut_captions(str(folder), long), strict=True))
    return [cut.get(caption) for caption in captions]


def _fetch_tokenizers(plan: Plan) -> Path:
    key, path = BASE_KEY, plan.config.model.pretrained_model_name_or_path
    parts = plan.variant.folders("tokenizer")
    return fetch(key, path, plan.config.model.revision, ("model_index.json", *(f"{part}/*" for part in parts)))


def encoder_folder(plan: Plan) -> Path:
    """The vision encoder's local folder, downloaded where it is on the hub."""
    assert plan.encoder is not None
    return fetch("crepa_encoder", plan.encoder.repo, None, _ENCODER_FILES)


def build_process(plan: Plan, tokens: int | None = None) -> FlowMatching:
    """The diffusion objective of the config, at the noise levels that the transformer is for.

    Args:
        tokens: of the clips; None: those of the config's size. Where the shift of the noise levels is the checkpoint's own, it
            is the one that clips of so many tokens have.
    """
    config = plan.config
    shift, own = config.diffusion.flow_shift, plan.checkpoint.flow_shift
    if tokens is not None and shift == own(plan.grid.tokens):
        shift = own(tokens)
    return FlowMatching(
        config.diffusion.timestep_sampling,
        config.diffusion.logit_mean,
        config.diffusion.logit_std,
        shift,
        between=plan.variant.sigmas,
    )


def build_crepa(plan: Plan) -> Crepa:
    """The alignment module with a fresh projector, from torch's global generator."""
    config = plan.config
    return Crepa(
        plan.geometry.width,
        plan.encoder.width if plan.encoder else plan.geometry.width,
        distance=config.crepa.crepa_adjacent_distance,
        tau=config.crepa.crepa_adjacent_tau,
        cumulative_neighbors=config.crepa.crepa_cumulative_neighbors,
        spatial_align=config.crepa.crepa_spatial_align,
        normalize_by_frames=config.crepa.crepa_normalize_by_frames,
        normalize_neighbour_sum=config.crepa.crepa_normalize_neighbour_sum,
        projector=config.crepa.crepa_projector,
    )


def build_encoder(plan: Plan, device: torch.device) -> VisionEncoder:
    """The teacher's vision encoder with its weights."""
    assert plan.encoder is not None
    return load_encoder(
        encoder_folder(plan),
        plan.encoder.patch,
        plan.encoder_size(plan.grid),
        frames_per_forward=plan.config.crepa.crepa_encoder_frames_batch_size,
        device=device,
        dtype=encoding_dtype(device),
    )


def build_vae(plan: Plan, family: Family, device: torch.device) -> Any:
    """The VAE with its weights, frozen."""
    folder = model_folder(plan)
    with loading(folder, (plan.variant.vae,)):
        vae = family.load_vae(str(folder), getattr(torch, plan.config.diffusion.vae_dtype))
    if plan.config.diffusion.vae_tiling:
        tile_vae(vae)
    return vae.to(device)


def text_encoding(plan: Plan) -> TextEncoding:
    """How the config has text encoders held."""
    loop = plan.config.loop
    return TextEncoding(loop.text_encoder_offload, loop.text_encoder_quantization)


def build_image_encoder(plan: Plan, family: Family, device: torch.device) -> Any:
    """The encoder beside the VAE that sees a first frame; None where the model has none."""
    folder = model_folder(plan)
    with loading(folder, plan.variant.folders("image_encoder", "image_processor")):
        encoder = family.load_image_encoder(str(folder), encoding_dtype(device))
    return encoder and encoder.to(device)


def build_teacher(plan: Plan, family: Family, device: torch.device) -> Teacher:
    """The teacher of `crepa_feature_source`, with the modules that it needs loaded; `cached` needs none."""
    return choose_teacher(plan, family, lambda: build_encoder(plan, device), lambda: build_vae(plan, family, device))


def choose_teacher(plan: Plan, family: Family, make_encoder: Callable[[], VisionEncoder], make_vae: Callable[[], Any]) -> Teacher:
    """The teacher of `crepa_feature_source`; a module is made only where it needs it."""
    config = plan.config
    if config.crepa.crepa_feature_source == "cached":
        return CachedTeacher()
    if config.crepa.crepa_feature_source == "backbone":
        return BackboneTeacher(config.crepa.teacher_block)
    encoder = make_encoder()
    if config.crepa.crepa_feature_source == "pixels":
        return PixelTeacher(encoder, plan.encoder_size)
    vae = make_vae()
    if config.crepa.crepa_drop_vae_encoder:
        family.drop_vae_encoder(vae)
    return LatentTeacher(encoder, plan.encoder_size, lambda latents: family.decode_latents(vae, latents))


def crepa_term(
    config: ResolvedCrepa,
    crepa: CrepaForward,
    teacher: Teacher,
    weight: float,
    timed: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> CrepaTerm:
    """CREPA's part of one step, on the config's block."""
    return CrepaTerm(crepa, teacher, config.block, weight, timed)


def build_layersync(config: ResolvedLayerSync) -> LayerSyncTerm | None:
    """LayerSync's part of every step; None where it is off or weighs nothing."""
    if not config.layersync_enabled or config.layersync_lambda == 0:
        return None
    return LayerSyncTerm(config.student_block, config.teacher_block, config.layersync_lambda)


def load_transformer(plan: Plan, family: Family, device: torch.device) -> Any:
    """The transformer with its weights on the CPU: to be adapted, then placed, and only then given an optimizer.

    Layers that are quantised are on the device already, which does it sooner, and needs no more memory for it than a layer.

    Raises:
        UserError: the checkpoint can't be reached, or a file of it is damaged.
    """
    folder = model_folder(plan)
    dtype, how = weights_dtype(plan.config), plan.config.loop.base_quantization
    with loading(folder, (plan.variant.transformer,)):
        if how != "none":
            resident = not plan.config.loop.block_offload
            return load_quantized(family, str(folder), dtype, how, device, stays=resident)
        return family.load_transformer(str(folder), dtype)


def empty_transformer(plan: Plan, family: Family) -> Any:
    """The transformer on the meta device, in the data types that `load_transformer` gives."""
    transformer = in_weights_dtype(plan, family.empty_transformer())
    quantize_blocks(family, transformer, plan.config.loop.base_quantization)
    return transformer


def in_weights_dtype(plan: Plan, transformer: Any) -> Any:
    """A transformer that was not loaded, in the data types that `load_transformer` gives."""
    keep = tuple(transformer._keep_in_fp32_modules or ())
    dtype = weights_dtype(plan.config)
    for name, parameter in transformer.named_parameters():
        stays = any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if stays else dtype)
    return transformer


def adapt(plan: Plan, family: Family, transformer: Any) -> None:
    """Make a transformer's trained weights trainable: all of them, or an adapter from torch's global generator.

    Raises:
        UserError: a target that is no layer of a block, or that no adapter file can hold.
    """
    config = plan.config
    if config.model.model_type == "full":
        transformer.requires_grad_(True)
        return
    for module in add_configured_lora(transformer, config.lora, plan.spec):
        family.export_name(module)
    if config.loop.mixed_precision != "no":
        leave_casts_to_autocast(transformer)


def expect_trainable(plan: Plan, family: Family, device: torch.device) -> Any:
    """Build the adapted transformer on the meta device, so that a run that can't be trained is refused early.

    Returns:
        The transformer, adapted where it is to be.

    Raises:
        UserError: a target that is no layer of a block, or a model that can't be trained on this device.
    """
    reason = family.untrainable(device)
    if reason:
        raise UserError(
            f"pretrained_model_name_or_path={plan.config.model.pretrained_model_name_or_path}: {reason}",
            "train it on a GPU, or take another checkpoint",
        )
    transformer = family.empty_transformer()
    adapt(plan, family, transformer)
    return transformer
