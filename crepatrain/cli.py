"""The commands of `crepatrain`. Thin: each reads its arguments, makes a plan and calls what does the work."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import crepatrain
from crepatrain.commands.validate import validate
from crepatrain.config.load import options_of_released_model, parse_numbers
from crepatrain.config.plan import Plan, read_plan
from crepatrain.config.run_config import RunConfig
from crepatrain.config.summary import summarize
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.exits import EXIT_DOES_NOT_FIT, exit_codes, stoppable
from crepatrain.quiet import quiet_imports
from crepatrain.specs import FAMILIES
from crepatrain.streams import lasting_output

app = typer.Typer(
    name="crepatrain",
    help="Fine-tune video diffusion transformers with CREPA, cross-frame representation alignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_screen = Screen(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks

_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="Config file, JSON or YAML. Its keys are options too: --crepa_lambda 0.3; `validate-config --schema` lists them.",
        show_default=False,
    ),
]


def main() -> None:
    """The entry point of the console script."""
    quiet_imports()
    with lasting_output(), exit_codes(_screen):
        app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(crepatrain.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(context_settings=_OPTIONS)
def fit(context: typer.Context, config: ConfigFile) -> None:
    """Train. The same command again in the same folder continues from its last checkpoint."""
    plan = _plan(config, context.args)

    def work() -> None:
        from crepatrain.commands import fit as command

        _summary(plan)
        command.fit(plan, _screen)

    stoppable(work, _screen)


@app.command(context_settings=_OPTIONS)
def cache(context: typer.Context, config: ConfigFile) -> None:
    """Fill the caches of latents, captions and teacher features, without training."""
    plan = _plan(config, context.args)

    def work() -> None:
        from crepatrain.commands.cache import cache as command

        command(plan, _screen)

    stoppable(work, _screen)


@app.command("validate-config", context_settings=_OPTIONS)
def validate_config(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="Config file, JSON or YAML.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, for editors.")] = False,
) -> None:
    """Check a config and describe in words what it will do. Loads neither torch nor weights."""
    if schema:
        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if config is None:
        raise UserError("no config file was given", "run crepatrain validate-config config.json")
    _summary(plan := _plan(config, context.args, online=False))
    validate(plan, _screen)


@app.command("dry-run", context_settings=_OPTIONS)
def dry_run(
    context: typer.Context,
    config: ConfigFile,
    estimate_vram: Annotated[
        bool, typer.Option("--estimate-vram", help="Estimate GPU memory: run the step on tensors without values and count them.")
    ] = False,
    fits: Annotated[
        float | None, typer.Option(min=0, help="Exit with code 5 if the estimate is above this many GB.", show_default=False)
    ] = None,
    assume_model: Annotated[
        str | None,
        typer.Option(help="Use the shapes of this released model (see `crepatrain families`) instead of the config's model."),
    ] = None,
    remedies: Annotated[
        bool, typer.Option("--remedies", help="Estimate every teacher source and every remedy too, which takes longer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the estimate, as JSON.")] = False,
) -> None:
    """Read every clip; show what training will use, its steps, disk space and GPU memory. Loads no weights."""
    plan = _plan(config, [*context.args, *options_of_released_model(assume_model)], online=False)

    def work() -> None:
        from crepatrain.commands import dryrun
        from crepatrain.stopping import StopSignal

        screen = Screen(quiet=True) if as_json else _screen
        if not as_json:
            _summary(plan)
        with StopSignal() as stop:
            dataset = dryrun.dry_run(plan, screen, stop)
        if not (estimate_vram or remedies or as_json or fits is not None):
            return
        estimate = dryrun.estimate_vram(plan, dataset, screen, gigabytes=fits, everything=remedies)
        if as_json:
            typer.echo(json.dumps(estimate.as_json(), indent=2))
        if fits is not None and not dryrun.fits(plan, list(dataset.clips.buckets), estimate, fits, screen):
            sys.exit(EXIT_DOES_NOT_FIT)

    stoppable(work, _screen)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folder of a run (its output_dir). Several runs are drawn in one report.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in the folder of a single run, or in this folder for several."),
    ] = None,
    with_map: Annotated[
        bool, typer.Option("--map", help="Load the model and measure where in the picture it agrees with the teacher.")
    ] = False,
) -> None:
    """Draw the logs of one or several runs as one HTML file: curves, videos, config, dataset."""

    def work() -> None:
        from crepatrain.commands.report import report as command

        command(runs, output, _screen, with_map=with_map)

    if with_map:
        stoppable(work, _screen)
    else:
        work()


@app.command()
def status(run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).", show_default=False)]) -> None:
    """Show in five lines where a run stands, from its files only."""
    from crepatrain.commands.status import status as command

    command(run, _screen)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 7860,
    host: Annotated[str | None, typer.Option(help="Address for other machines; a token is printed.", show_default=False)] = None,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are shown and made.")] = Path("outputs"),
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of clips, models or configs; may be given several times. Default: clips.", show_default=False),
    ] = None,
) -> None:
    """Open a page in the browser that writes configs, starts runs and shows them. Needs the extra ui."""
    from crepatrain.web.opening import open_page

    open_page(port, host, runs, data or [Path("clips")], _screen)


@app.command()
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

        command(run, asked_step(run, step), dtype, output, _screen, weights=weights)

    stoppable(work, _screen)


@app.command()
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
        command(base, adapters, strengths, output, dtype, _screen)

    stoppable(work, _screen)


@app.command()
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

        command(file, base, _screen)

    stoppable(work, _screen)


@app.command()
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
        Literal["none", "int8", "fp8", "nf4"], typer.Option(help="Of the transformer's blocks.")
    ] = "none",
    text_encoder_quantization: Annotated[Literal["none", "int8", "nf4"] | None, typer.Option(help="Default: as trained.")] = None,
    vae_tiling: Annotated[bool | None, typer.Option(help="Decode in tiles. Default: as in training.", show_default=False)] = None,
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
        command.sample(target, options, _screen)

    stoppable(work, _screen)


@app.command()
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

        command(run, _screen, repo=repo, private=private, step=asked_step(run, step), dry=dry)

    stoppable(work, _screen)


@app.command("make-random")
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

    command(family, folder, size, seed, _screen)


@app.command("make-clips")
def make_clips(folder: Annotated[Path, typer.Argument(help="Where to write the clips.")]) -> None:
    """Write a handful of short captioned clips to try the trainer on."""
    from crepatrain.commands.demo_clips import make_clips as command

    command(folder, _screen)


@app.command()
def families() -> None:
    """Show what is known of each family and its released models."""
    from crepatrain.commands.families import families as command

    command(_screen)


def _plan(config: Path, options: list[str], *, online: bool = True) -> Plan:
    if str(config).startswith("--"):
        raise UserError(f"{config} stands before the config file", "write options after the config file")
    return read_plan(config, options, online=online)


def _summary(plan: Plan) -> None:
    _screen.rows(f"crepatrain {crepatrain.__version__}", summarize(plan))
    for warning in plan.warnings:
        _screen.note(warning)
