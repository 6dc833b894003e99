"""What is known of each family and of its released models, as tables."""

from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES, FamilySpec


def families(screen: Screen) -> None:
    """Print the tables: sizes and defaults of every released model, defaults of every family, and where the models are."""
    models = [(spec, name) for spec in FAMILIES.values() for name in spec.released]
    screen.table(
        "families: frames x height x width, and legal ones",
        ("model", "tasks", "blocks", "size", "legal", "fps", "shift"),
        [_released(spec, name) for spec, name in models],
    )
    screen.rows(
        "CREPA block; caption tokens; LoRA targets",
        [(spec.name, f"{spec.default_block}; {_text(spec)}; {', '.join(spec.lora_targets)}") for spec in FAMILIES.values()],
    )
    screen.rows("on the hub", [(name, str(spec.released[name].repo)) for spec, name in models])


def _text(spec: FamilySpec) -> str:
    """Tokens of a caption at most, in all released models."""
    lengths = {spec.text_length_of(spec.variant(model.checkpoint, None)) for model in spec.released.values()}
    return " or ".join(map(str, sorted(lengths)))


def _released(spec: FamilySpec, name: str) -> tuple[str, ...]:
    """The row of a released model."""
    model = spec.released[name]
    variant, geometry = spec.variant(model.checkpoint, None), spec.geometry(model.transformer, model.vae)
    height, width, frames = variant.size
    shift = model.checkpoint.flow_shift(geometry.token_grid(frames, height, width).tokens)
    return (
        name,
        ", ".join(variant.tasks),
        f"{geometry.depth} x {geometry.width}",
        f"{frames}x{height}x{width}",
        f"{geometry.frames_rule}, {geometry.size_multiple[0]}n",
        f"{variant.fps:g}",
        f"{shift:.3g}",
    )
