"""What the config.json of a VAE says of its latents, for VAEs that more than one family uses."""

from crepatrain.specs.base import JSON

# AutoencoderKLWan of Wan 2.1; the released latents_mean and latents_std are the class's own defaults.
WAN_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


def wan_latents(vae: JSON) -> tuple[int, int, int]:
    """(temporal stride, spatial stride, channels) of an AutoencoderKLWan."""
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8), vae["z_dim"]


def ltx_latents(vae: JSON) -> tuple[int, int, int]:
    """(temporal stride, spatial stride, channels) of an AutoencoderKLLTXVideo or AutoencoderKLLTX2Video."""
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    return (
        vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings,
        vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings,
        vae["latent_channels"],
    )
