"""The commands for what a run has made, and for checkpoints and clips to try things on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from crepatrain.cli_app import screen
from crepatrain.config.load import parse_numbers
from crepatrain.exits import stoppable
from crepatrain.specs import FAMILIES


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).", show_default=False)],
    step: Annotated[
        str | None, typer.Option(help="Step of the checkpoint, or best. Default: the last one.", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Data type of the tensors in the file.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write; a folder for a run with model_type full. Default: in the run's folder exports/.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"] | None,
        typer.Option(
            help="Only for a run with use_ema. raw: the last weights; ema: their average, which is the default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the adapter of a checkpoint again, or its whole transformer, also as one file for ComfyUI."""

    def work() -> None:
        from crepatrain.commands.export import export as command
        from crepatrain.records.opening import asked_step

        command(run, asked_step(run, step), dtype, output, screen, weights=weights)

    stoppable(work, screen)


def merge(
    base: Annotated[str, typer.Argument(help="Folder of a diffusers pipeline, or its hub id.", show_default=False)],
    adapters: Annotated[list[Path], typer.Argument(help="One or several adapter files.", show_default=False)],
    output: Annotated[Path, typer.Option(help="A new folder to write the transformer to.", show_default=False)],
    strength: Annotated[
        str, typer.Option(help="Strength of each adapter, separated by commas. Default: 1 for each.", show_default=False)
    ] = "",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Data type of the weights on the disk.")
    ] = "bfloat16",
) -> None:
    """Add adapters to a transformer's own weights, and report how much of them the final cast keeps."""

    def work() -> None:
        from crepatrain.commands.merge import merge as command

        strengths = parse_numbers(strength, float, "--strength") or (1.0,) * len(adapters)
        command(base, adapters, strengths, output, dtype, screen)

    stoppable(work, screen)


def verify(
    file: Annotated[Path, typer.Argument(help="Adapter file of this or any other trainer.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the base as a diffusers pipeline; its config.json files are enough. Checks the shapes too.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what diffusers and ComfyUI load from an adapter file, and what is wrong with it; exit with code 2 if anything is."""

    def work() -> None:
        from crepatrain.commands.verify import verify as command

        command(file, base, screen)

    stoppable(work, screen)


def sample(
    target: Annotated[Path, typer.Argument(help="Folder of a run, or an adapter file of crepatrain.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(help="What the video shows. Default: a validation prompt or a caption of the run.", show_default=False),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the video must not show. Default: as the adapter's recipe says.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Required for image-to-video: an image, or a clip whose first frame is used.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.", min=2, show_default=False)] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.", show_default=False)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames. Default: as in training.", min=1, show_default=False)
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: as in training.", min=1, show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: as in training.", min=1, show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise, the same for every video.")] = 42,
    strength: Annotated[str, typer.Option(help="Strength of the adapter; several, separated by commas, are compared.")] = "1.0",
    at: Annotated[
        str, typer.Option(help="Steps of a run whose adapters are compared, separated by commas.", show_default=False)
    ] = "",
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base, instead of the one that the recipe names.", show_default=False),
    ] = None,
    base_quantization: Annotated[
        Literal["none", "int8", "fp8", "nf4"],
        typer.Option(help="Hold the weights of the transformer's blocks in fewer bits, whatever they were trained in."),
    ] = "none",
    text_encoder_quantization: Annotated[
        Literal["none", "int8", "nf4"] | None,
        typer.Option(help="Bits of the text encoder's weights. Default: as in training.", show_default=False),
    ] = None,
    vae_tiling: Annotated[
        bool | None, typer.Option(help="Decode in overlapping tiles. Default: as in training.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write, an .mp4.", show_default=False)] = None,
) -> None:
    """Make a video with an adapter, and beside it one without the adapter, from the same seed."""

    def work() -> None:
        from crepatrain.commands import sample as command

        options = command.SampleOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            steps=steps,
            guidance=guidance,
            frames=frames,
            height=height,
            width=width,
            seed=seed,
            at=parse_numbers(at, int, "--at"),
            strengths=parse_numbers(strength, float, "--strength") or (1.0,),
            base=base,
            output=output,
            base_quantization=base_quantization,
            text_encoder_quantization=text_encoder_quantization,
            vae_tiling=vae_tiling,
        )
        command.sample(target, options, screen)

    stoppable(work, screen)


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).", show_default=False)],
    repo: Annotated[
        str | None,
        typer.Option(
            help="Repository on the hub, with or without its owner. Default: the run's hub_model_id.", show_default=False
        ),
    ] = None,
    step: Annotated[
        str | None, typer.Option(help="Step of the adapter, or best. Default: the last one.", show_default=False)
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Whether a new repository is private. Default: the run's hub_private_repo.",
            show_default=False,
        ),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Write the model card and list what would be uploaded, but upload nothing.")
    ] = False,
) -> None:
    """Upload a run's result to the Hugging Face hub with a model card. Clips, captions and config are not uploaded."""

    def work() -> None:
        from crepatrain.commands.push import push as command
        from crepatrain.records.opening import asked_step

        command(run, screen, repo=repo, private=private, step=asked_step(run, step), dry=dry)

    stoppable(work, screen)


def make_random(
    family: Annotated[str, typer.Argument(help=f"One of: {', '.join(FAMILIES)}.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    size: Annotated[
        str | None, typer.Option(help="Use the shapes of this released model (see `crepatrain families`) instead of tiny ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a complete diffusers checkpoint with random weights, and a tiny vision encoder beside it."""
    from crepatrain.commands.random_checkpoint import make_random as command

    command(family, folder, size, seed, screen)


def make_clips(folder: Annotated[Path, typer.Argument(help="Where to write the clips.")]) -> None:
    """Write a handful of short captioned clips to try the trainer on."""
    from crepatrain.commands.demo_clips import make_clips as command

    command(folder, screen)


def families() -> None:
    """Show what is known of each family and its released models."""
    from crepatrain.commands.families import families as command

    command(screen)


def add_to(app: typer.Typer) -> None:
    """Make these commands of the app."""
    for command in (export, merge, verify, sample, push, families):
        app.command()(command)
    app.command("make-random")(make_random)
    app.command("make-clips")(make_clips)
