"""What an adapter's header says: how it was trained, and how to sample it. It holds no caption and no path of the machine."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import crepatrain
from crepatrain.config.resolved import ResolvedConfig, ResolvedCrepa, ResolvedDiffusion
from crepatrain.families.base import TRAIN_TIMESTEPS, Family

SCHEMA = 1
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def adapter_metadata(
    config: ResolvedConfig,
    family: Family,
    fingerprint: Mapping[str, Any],
    step: int,
    *,
    layers: Sequence[str],
    day: date,
    averaged: bool,
) -> dict[str, str]:
    """The header of an adapter's safetensors file.

    It has no rank or alpha for diffusers: programs infer the rank and assume that alpha equals it, which is what a baked scale
    means. For the same reason ss_network_alpha is the rank; the alpha of training is in the recipe.

    Args:
        config: with its defaults filled in.
        fingerprint: of the run.
        step: optimizer steps behind the adapter.
        layers: names of the adapted layers.
        day: on which it is written.
        averaged: whether its weights are the moving average.
    """
    variant, rank = family.variant, str(config.lora.lora_rank)
    low, high = (round(sigma * TRAIN_TIMESTEPS) for sigma in variant.sigmas)
    _, height, width = config.data.size
    title = config.loop.output_name + (f", {variant.expert} noise" if variant.expert else "")
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": variant.architecture,
        "ss_steps": str(step),
        "ss_epoch": str(step * fingerprint["unit"] // fingerprint["windows"]),
        "ss_learning_rate": str(config.optim.learning_rate),
        "ss_seed": str(config.loop.seed),
        "ss_discrete_flow_shift": str(_training_shift(config.diffusion)),
        "ss_timestep_sampling": config.diffusion.timestep_sampling,
        "ss_output_name": config.loop.output_name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{variant.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": day.isoformat(),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "flow",
        "modelspec.timestep_range": f"{low},{high}",
        "crepatrain.version": crepatrain.__version__,
        "crepatrain.format": "1",
        "crepatrain.step": str(step),
        "crepatrain.scale": "baked",
        "crepatrain.recipe": json.dumps(recipe(config, family, fingerprint, step, layers, averaged=averaged)),
    }
    if config.loop.trigger_word:
        metadata["modelspec.trigger_phrase"] = config.loop.trigger_word
    if variant.expert:
        metadata["crepatrain.expert"] = variant.expert
    return metadata


def recipe(
    config: ResolvedConfig, family: Family, fingerprint: Mapping[str, Any], step: int, layers: Sequence[str], *, averaged: bool
) -> dict[str, Any]:
    """What a program must know to sample as the adapter was trained, and a reader to train it again."""
    frames, height, width = config.data.size
    return {
        "schema": SCHEMA,
        "family": family.spec.name,
        "variant": family.variant.title,
        "task": family.task,
        "base": {
            "repo": public_name(config.model.pretrained_model_name_or_path),
            "revision": config.model.revision,
            "sha256": fingerprint["models"][family.variant.transformer],
        },
        "expert": family.variant.expert,
        "rank": config.lora.lora_rank,
        "alpha_trained": config.lora.lora_alpha,  # null where every weight is trained
        "rslora": config.lora.lora_use_rslora,
        "scale_baked": True,
        "targets": sorted({re.sub(r"^\w*blocks\.\d+\.", "", layer) for layer in layers}),
        "train": {
            "shift": _training_shift(config.diffusion),
            "timestep_sampling": config.diffusion.timestep_sampling,
            "t_range": list(family.variant.sigmas),
            "base_dtype": "bfloat16" if config.loop.mixed_precision == "bf16" else "float32",
            "quant": None if config.loop.base_quantization == "none" else config.loop.base_quantization,
            "text_quant": None if config.loop.text_encoder_quantization == "none" else config.loop.text_encoder_quantization,
            "vae_tiling": config.diffusion.vae_tiling,
            "resolutions": [[height, width]],
            "aspect_buckets": config.data.aspect_buckets,
            "frames": frames,
            "fps": config.data.fps,
            "caption_max_tokens": family.text_length,
            "prompt_template_id": family.pipeline,  # whose encode_prompt the captions went through
            "trigger": config.loop.trigger_word,
        },
        "crepa": _crepa(config.crepa),
        "sample": family.sample_defaults(frames, height, width, config.data.rate(family.variant.fps)),
        "ema": {"used": averaged, "decay": config.optim.ema_decay if averaged else None},
        "step": step,
        "versions": dict(fingerprint["versions"]),
    }


def public_name(model: str) -> str:
    """A hub id as it is; only the name of a folder, as the rest of its path is private."""
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else Path(model).resolve().name


def _training_shift(config: ResolvedDiffusion) -> float:
    return config.flow_shift if config.timestep_sampling == "shifted" else 1.0


def _crepa(config: ResolvedCrepa) -> dict[str, Any] | None:
    if not config.crepa_enabled:
        return None
    return {
        "block": config.block,
        "lambda": config.crepa_lambda,
        "scheduler": config.crepa_scheduler,
        "distance": config.crepa_adjacent_distance,
        "tau": config.crepa_adjacent_tau,
        "source": config.crepa_feature_source,
        "encoder": None if config.crepa_feature_source == "backbone" else public_name(config.crepa_encoder),
        "cutoff_step": config.crepa_cutoff_step,
        "similarity_threshold": config.crepa_similarity_threshold,
    }
