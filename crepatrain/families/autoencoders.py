"""Latents of the VAEs that more than one family uses: the mode of the encoder's distribution, normalised."""

from typing import Any

import torch
from torch import Tensor

from crepatrain.errors import UserError

# Of small models with random weights.
TINY_WAN_VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}

_STATISTICS = "_crepatrain_latent_statistics"


def tile_vae(vae: Any) -> None:
    """Let a VAE of diffusers encode and decode large frames in overlapping tiles, and the clips of a batch one by one.

    Raises:
        UserError: it can't.
    """
    try:
        vae.enable_tiling()
        vae.enable_slicing()
    except (AttributeError, NotImplementedError) as error:
        what = f"vae_tiling=true: {type(vae).__name__} can't encode and decode in tiles"
        raise UserError(what, "set vae_tiling to false", ("vae_tiling",)) from error


def encode_wan(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] -> (z - mean) / std with the config's mean and std, fp32."""
    mean, std = _config_statistics(vae, pixels.device)
    return (vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() - mean) / std


def decode_wan(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `encode_wan`, as pixels."""
    mean, std = _config_statistics(vae, latents.device)
    return vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]


def _config_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents, [1, C, 1, 1, 1] each, fp32; kept with the VAE, as a copy in every step is waited for."""
    kept = getattr(vae, _STATISTICS, None)
    if kept is None or kept.device != device:
        kept = torch.tensor([vae.config["latents_mean"], vae.config["latents_std"]]).to(device)
        setattr(vae, _STATISTICS, kept)
    mean, std = kept
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def encode_ltx(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] -> (z - mean) * scaling_factor / std with the VAE's buffers, fp32."""
    mean, std = _buffer_statistics(vae)
    return (vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() - mean) / std


def decode_ltx(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `encode_ltx`, as pixels; a VAE that is conditioned on the noise level gets 0, no noise."""
    mean, std = _buffer_statistics(vae)
    z = (latents.float() * std + mean).to(vae.dtype)
    timestep = z.new_zeros(z.shape[0]) if vae.config.timestep_conditioning else None
    return vae.decode(z, timestep, return_dict=False)[0]


def _buffer_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    std = vae.latents_std.float() / vae.config.scaling_factor
    return vae.latents_mean.float().view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
