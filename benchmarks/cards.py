"""Which models train on which cards, and with which settings: what `memory: auto` chooses.

The estimate of the training step alone, on tensors without values: no GPU and no weights are needed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS, write

from crepatrain.config.memory_checks import MEMORY_KEYS
from crepatrain.config.plan import Plan, make_plan
from crepatrain.config.run_config import RunConfig
from crepatrain.data.buckets import Bucket
from crepatrain.memory.cards import CARDS, usable
from crepatrain.memory.choosing import Choice, Chooser
from crepatrain.specs import FAMILIES

RESULT = RESULTS / "cards.json"
MODELS: Mapping[str, str] = {
    "wan2.1-1.3b": "Wan 2.1 1.3B",
    "wan2.2-5b": "Wan 2.2 5B",
    "wan2.1-14b": "Wan 2.1 14B, 2.2 A14B",
    "wan2.1-i2v-14b": "Wan 2.1 I2V 14B",
    "ltx-2b": "LTX-Video 2B",
    "ltx-13b": "LTX-Video 13B",
    "sana-2b": "SANA-Video 2B",
    "kandinsky5-lite": "Kandinsky 5 Lite",
}
FRAMES = (17, 49, 81)
SOLD = tuple(size for size in CARDS if size <= 80)


def plan_of(name: str, frames: int) -> Plan:
    """A LoRA of rank 32 on attention, with CREPA from cached features."""
    spec = next(spec for spec in FAMILIES.values() if name in spec.released)
    config = {
        "model_family": spec.name,
        "pretrained_model_name_or_path": spec.released[name].repo,
        "train_data": "benchmarks",
        "output_dir": "outputs/none",
        "max_train_steps": 100,
        "height": 480,
        "width": 832,
        "num_frames": frames,
        "lora_rank": 32,
        "crepa_enabled": True,
        "crepa_encoder_image_size": "grid",
    }
    return make_plan(RunConfig.model_validate(config), online=False)


def choices(name: str, frames: int, cards: Sequence[int] = SOLD) -> dict[int, Choice]:
    """What `memory: auto` takes, by card."""
    plan = plan_of(name, frames)
    chooser = Chooser(plan, MEMORY_KEYS, Bucket(*plan.size))
    return {card: chooser.choose(usable(card), None) for card in cards}


def cell(choice: Choice) -> str:
    """A choice in a few words."""
    if not choice.fits:
        return "no"
    words = [{False: "keep all", "selective": "selective", True: "recompute"}[choice.values["gradient_checkpointing"]]]
    blocks = choice.values["block_offload"]
    words += [f"{blocks} blocks"] if blocks else []
    words += ["inputs"] if choice.values["checkpoint_offload"] else []
    words += ["nested"] if choice.values["nested_checkpointing"] else []
    return ", ".join(words)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each number of frames, of the models that are known."""
    cells = {(row["model"], row["frames"], row["GB"]): row["settings"] for row in rows}
    head = " | ".join(f"{size} GB" for size in SOLD)
    lines = []
    for frames in FRAMES:
        lines += ["", f"{frames} frames of 480 x 832:", "", f"| | {head} |", "|---" * (len(SOLD) + 1) + "|"]
        for name, title in MODELS.items():
            if (name, frames, SOLD[0]) in cells:
                lines.append(f"| {title} | {' | '.join(cells[name, frames, size] for size in SOLD)} |")
    return "\n".join([*lines, "", ""])


def rows_of(name: str) -> list[dict[str, Any]]:
    """All cells of a model."""
    rows = []
    for frames in FRAMES:
        for size, choice in choices(name, frames).items():
            peaks = {"peak GiB": choice.peak / (1 << 30), "host GiB": choice.on_host / (1 << 30)}
            rows.append({"model": name, "frames": frames, "GB": size, "settings": cell(choice), **peaks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="Only these; the rows of the others stay.")
    for name in parser.parse_args().models:
        known = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
        rows = [row for row in known if row["model"] != name] + rows_of(name)
        write("cards", "python benchmarks/cards.py", rows)
        print(tables(rows))


if __name__ == "__main__":
    main()
