"""What the config.json of a VAE says of its latents, for VAEs that more than one family uses."""

from crepatrain.specs.base import JSON, switches, whole_number

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
    return whole_number(vae, "scale_factor_temporal", 4), whole_number(vae, "scale_factor_spatial", 8), whole_number(vae, "z_dim")


def ltx_latents(vae: JSON) -> tuple[int, int, int]:
    """(temporal stride, spatial stride, channels) of an AutoencoderKLLTXVideo or AutoencoderKLLTX2Video."""
    halvings = 2 ** sum(switches(vae, "spatio_temporal_scaling"))

    def stride(ratio: str, patch: str) -> int:
        return whole_number(vae, patch) * halvings if vae.get(ratio) is None else whole_number(vae, ratio)

    temporal, spatial = stride("temporal_compression_ratio", "patch_size_t"), stride("spatial_compression_ratio", "patch_size")
    return temporal, spatial, whole_number(vae, "latent_channels")
