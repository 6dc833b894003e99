"""Step time against clip length, from the results of crepa_overhead.py, as an SVG for the README."""

import argparse
import json
from pathlib import Path

from common import RESULTS

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 340, 60, 44, 24, 130
COLOURS = {"plain": "#555555", "cached": "#1a7f37", "pixels": "#0969da", "latents": "#bf8700", "reference": "#cf222e"}


def read(size: str, device: str) -> dict[str, list[tuple[int, float]]]:
    """Per kind of step (frames, seconds), by length."""
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in COLOURS}
    for path in RESULTS.glob(f"crepa_overhead-{size}-*-{device}.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["step"] in lines:
                lines[row["step"]].append((row["frames"], row["seconds"]))
    return {name: sorted(points) for name, points in lines.items()}


def draw(lines: dict[str, list[tuple[int, float]]], title: str) -> str:
    most_frames = max(frames for points in lines.values() for frames, _ in points)
    most_seconds = max(seconds for points in lines.values() for _, seconds in points) * 1.05

    def x(frames: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * frames / most_frames

    def y(seconds: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * seconds / most_seconds

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="15" font-weight="bold">{title}</text>',
        f'<path d="M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">pixel frames of a clip</text>',
        f'<text transform="rotate(-90)" x="{-HEIGHT / 2}" y="14" text-anchor="middle">seconds a step</text>',
    ]
    lengths = sorted({frames for points in lines.values() for frames, _ in points})
    parts += [f'<text x="{x(frames):.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{frames}</text>' for frames in lengths]
    for tick in range(1, 5):
        seconds = most_seconds * tick / 4
        parts.append(f'<text x="{LEFT - 6}" y="{y(seconds) + 4:.0f}" text-anchor="end">{seconds:.1f}</text>')
    label = HEIGHT
    for name, points in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        path = " ".join(
            f"{'L' if index else 'M'}{x(frames):.1f} {y(seconds):.1f}" for index, (frames, seconds) in enumerate(points)
        )
        label = min(y(points[-1][1]) + 4, label - 14)
        parts.append(f'<path d="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{label:.0f}" fill="{COLOURS[name]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    title = f"a training step by teacher source ({options.size}, {options.device})"
    Path("docs/step-time.svg").write_text(draw(read(options.size, options.device), title), encoding="utf-8")


if __name__ == "__main__":
    main()
