"""Writing short captioned clips to try the trainer on: textured shapes that move over a textured background."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crepatrain.data.encode import write_video
from crepatrain.outputs import expect_nothing_at
from crepatrain.screen import Screen


@dataclass(frozen=True)
class _Scene:
    caption: str
    shape: str
    velocity: tuple[float, float]  # pixels a frame, down and right
    colour: tuple[int, int, int]


_SCENES = (
    _Scene("a red disc moves slowly to the right over a dark field", "disc", (0.2, 1.6), (220, 60, 50)),
    _Scene("a green square falls through a dark field", "square", (1.3, 0.3), (60, 190, 80)),
    _Scene("a blue disc rises to the upper left", "disc", (-0.9, -1.2), (70, 90, 230)),
    _Scene("a yellow square crosses from right to left", "square", (0.4, -2.0), (230, 200, 60)),
    _Scene("a violet disc drifts down and to the right", "disc", (0.8, 0.8), (170, 80, 200)),
    _Scene("a white square hurries to the right", "square", (-0.3, 2.4), (230, 230, 230)),
)


def make_clips(folder: Path, screen: Screen) -> None:
    """Write the demo's clips with their captions.

    Raises:
        UserError: the folder is not empty.
    """
    expect_nothing_at(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(_SCENES):
        path = folder / f"clip-{number}.mp4"
        write_video(path, _render(scene, seed=number), fps=16)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")
    screen.say(f"wrote {len(_SCENES)} captioned clips to {folder}")


def _render(scene: _Scene, *, seed: int, frames: int = 36, height: int = 144, width: int = 208, radius: int = 26) -> np.ndarray:
    noise = np.random.default_rng(seed)
    ground = 40 + 25 * _texture(noise, height, width)
    skin = 1 + 0.25 * _texture(noise, height * 2, width * 2)
    rows, columns = np.mgrid[0:height, 0:width]
    pictures = []
    for frame in range(frames):
        row = (height / 2 + scene.velocity[0] * (frame - frames / 2)) % height
        column = (width / 2 + scene.velocity[1] * (frame - frames / 2)) % width
        down, right = rows - row, columns - column
        inside = np.hypot(down, right) < radius if scene.shape == "disc" else np.maximum(abs(down), abs(right)) < radius
        shade = skin[np.round(down).astype(int) + height, np.round(right).astype(int) + width]  # the texture moves with the shape
        picture = np.repeat(ground[..., None], 3, axis=2)
        picture[inside] = (shade[..., None] * np.array(scene.colour))[inside]
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(pictures)


def _texture(noise: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft blotches in about [-1, 1]."""
    coarse = noise.uniform(-1, 1, (height // 8 + 2, width // 8 + 2))
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
