"""What CREPA costs a training step, by teacher source, against the plain step and against the way that other trainers go.

`reference` decodes the latents with the VAE and encodes every pixel frame at 518 x 518 in each step, with the literal loss.
Sizes: small (a CPU step of half a second and more, DINOv2-s), or a released model's shapes with DINOv2-g, for a GPU.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from common import FAMILY, SIZES, arguments, build_batch, build_transformer, geometry, paired, peak_bytes, ratio, write
from diffusers import AutoencoderKLWan
from loss import literal
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from crepatrain.alignment.capture import capture_blocks
from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.alignment.teachers import BackboneTeacher, CachedTeacher, LatentTeacher, PixelTeacher, Teacher
from crepatrain.geometry import TokenGrid
from crepatrain.specs import WAN
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.step import CrepaTerm, training_loss

BLOCK = 8
PATCH = 14


def small_encoder() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH)
    )


def giant_encoder() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, patch_size=PATCH, use_swiglu_ffn=True
    )
    return Dinov2Model(config)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--frames", type=int, help="pixel frames of the clip")
    options = parser.parse_args()
    device = torch.device(options.device)
    config, (frames, height, width) = SIZES[options.size]
    frames = options.frames or frames
    dtype = torch.bfloat16 if options.size != "small" else torch.float32
    torch.manual_seed(0)
    transformer = build_transformer(config, device, dtype)
    shape = geometry(config)
    grid = shape.token_grid(frames, height, width)
    with torch.device(device):
        encoder_model = small_encoder() if options.size == "small" else giant_encoder()
        vae_config = WAN.released["wan2.1-1.3b"].vae
        vae: Any = AutoencoderKLWan.from_config({**vae_config, "base_dim": 24} if options.size == "small" else dict(vae_config))
    encoder = VisionEncoder(encoder_model.to(dtype), PATCH, frames_per_forward=8).to(device)
    vae = vae.to(dtype).requires_grad_(False)
    feature_width = encoder_model.config.hidden_size
    batch = build_batch(
        shape, (frames, height, width), device, text_width=config["text_dim"], teacher=(feature_width, (grid.h, grid.w))
    )
    crepas = {width: Crepa(shape.width, width).to(device) for width in {feature_width, shape.width}}
    process = FlowMatching("logit_normal")

    def to_grid(grid: TokenGrid) -> tuple[int, int]:
        return PATCH * grid.h, PATCH * grid.w

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return FAMILY.decode_latents(vae, latents)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        transformer.zero_grad(set_to_none=True)

    def step(teacher: Teacher | None, feature_width: int = feature_width) -> Callable[[], None]:
        term = teacher and CrepaTerm(crepas[feature_width], teacher, BLOCK, weight=0.5)

        def run() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses = training_loss(FAMILY, process, transformer, transformer.blocks, batch, term)
            backward(losses.total)

        return run

    work = {
        "plain": step(None),
        "cached": step(CachedTeacher()),
        "backbone": step(BackboneTeacher(BLOCK + 1), shape.width),
        "pixels": step(PixelTeacher(encoder, to_grid)),
        "latents": step(LatentTeacher(encoder, to_grid, decode)),
        "reference": lambda: backward(reference(process, transformer, batch, crepas[feature_width], encoder, decode, dtype)),
    }
    seconds = paired(work, options.repeats, device)
    resident = [*transformer.parameters(), *encoder.parameters(), *vae.parameters(), batch.latents, batch.noise]
    rows = []
    for name, run in work.items():
        with FlopCounterMode(display=False) as flops:
            run()
        against = ratio(seconds[name], seconds["plain"])
        rows.append(
            {
                "step": name,
                "frames": frames,
                "seconds": sorted(seconds[name])[options.repeats // 2],
                "time ratio": against["median"],
                "low": against["low"],
                "high": against["high"],
                "TFLOP": flops.get_total_flops() / 1e12,
                "activation peak MiB": peak_bytes(run, resident) / 2**20,
            }
        )
    for row in rows:
        row["FLOP ratio"] = row["TFLOP"] / rows[0]["TFLOP"]
    write(f"crepa_overhead-{options.size}-{frames}-{options.device}", " ".join(["python", *sys.argv]), rows)


def reference(
    process: FlowMatching,
    transformer: Any,
    batch: Batch,
    crepa: Crepa,
    encoder: VisionEncoder,
    decode: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode everything, encode everything at 518 x 518, subsample to the token frames, literal loss."""
    grid = batch.grid
    with torch.autocast(batch.latents.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        noisy = process.add_noise(batch.latents, batch.noise, batch.sigma)
        with capture_blocks(transformer.blocks, {BLOCK}) as captured:
            prediction = FAMILY.denoise(transformer, noisy, batch.sigma, batch)
        diffusion = process.loss(prediction, batch.latents, batch.noise, None).mean()
    with torch.no_grad():
        pixels = decode(batch.latents)
        frames = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).transpose(1, 2)
        seen = encoder(frames, (518, 518))
        every = seen.values[:, [index * (frames.shape[1] - 1) // (grid.t - 1) for index in range(grid.t)]]
        flat = every.flatten(0, 1).transpose(1, 2).float()
        onto = torch.nn.functional.interpolate(flat, size=grid.patches, mode="linear").transpose(1, 2)
    features = PatchFeatures(onto.unflatten(0, (1, grid.t)), (grid.h, grid.w))
    return diffusion + 0.5 * literal(crepa, captured[BLOCK], features, grid)


if __name__ == "__main__":
    main()
