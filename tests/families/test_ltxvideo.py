"""What the generations of LTX-Video differ in, in numbers."""

import pytest
import torch
from common import tiny_family

from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch

FPS = 25.0
GRID = TokenGrid(4, 2, 3, ((0, 1), (1, 9), (9, 17), (17, 25)))
FIRST, CAUSAL = (0.0, 0.32, 0.64, 0.96), (0.0, 0.04, 0.36, 0.68)
SECONDS = {"tiny": FIRST, "tiny-timestep-vae": FIRST, "tiny-0.9.5": CAUSAL}


def angles(rope, seconds):
    """Cosines of the angles of tokens at some seconds and on a grid of 32 pixels, for a batch of two: [2, S, D]."""
    places = [(t, 32.0 * h, 32.0 * w) for t in seconds for h in range(GRID.h) for w in range(GRID.w)]
    return rope(torch.empty(2, GRID.tokens, 1), video_coords=torch.tensor(places).T.expand(2, -1, -1))[0]


@pytest.mark.parametrize(("task", "given"), [("t2v", None), ("i2v", [1.0, 1.0]), ("i2v", [1.0, 0.0])])
@pytest.mark.parametrize("size", SECONDS)
def test_token_frames_are_at_the_seconds_of_their_generation(size, task, given):
    family = tiny_family("ltxvideo", size, task=task)
    torch.manual_seed(0)
    transformer = family.transformer_class.from_config(dict(family.checkpoint.transformer))
    kept = []
    transformer.rope.register_forward_hook(lambda _module, _arguments, output: kept.append(output[0]))
    latents, noise = torch.randn(2, 2, 8, 4, 2, 3)
    text = family.collate_text([{"prompt_embeds": torch.randn(length, 32)} for length in (5, 7)])
    conditioning = {"first_frame": torch.randn(2, 8, 1, 2, 3), "given": torch.tensor(given)} if given else {}
    batch = Batch(latents, noise, torch.tensor([0.3, 0.7]), text, GRID, FPS, ("a", "b"), conditioning)
    with torch.no_grad():
        family.denoise(transformer, batch.noise, batch.sigma, batch)
    (found,) = kept
    other = FIRST if SECONDS[size] is CAUSAL else CAUSAL
    torch.testing.assert_close(found, angles(transformer.rope, SECONDS[size]), rtol=0, atol=5e-3)
    assert (found - angles(transformer.rope, other)).abs().max() > 0.5


@pytest.mark.parametrize(("size", "length"), [("tiny", 128), ("tiny-0.9.5", 256)])
def test_captions_are_as_long_as_the_pipeline_reads_them(size, length):
    family = tiny_family("ltxvideo", size)
    assert family.text_length == length
    assert family.text_shapes()["prompt_embeds"][0] == length
    assert family.collate_text([{"prompt_embeds": torch.zeros(3, 32)}])["mask"].shape == (1, length)
