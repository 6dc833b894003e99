"""The commands around training. Thin: each reads its arguments, makes a plan and calls what does the work."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import crepatrain
from crepatrain import cli_results
from crepatrain.cli_app import OPTIONS, ConfigFile, app, plan_of, screen, summary
from crepatrain.commands.validate import validate
from crepatrain.config.load import options_of_released_model
from crepatrain.config.run_config import RunConfig
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.exits import EXIT_DOES_NOT_FIT, exit_codes, stoppable
from crepatrain.quiet import quiet_imports
from crepatrain.streams import lasting_output


def main() -> None:
    """The entry point of the console script."""
    quiet_imports()
    with lasting_output(), exit_codes(screen):
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


@app.command(context_settings=OPTIONS)
def fit(context: typer.Context, config: ConfigFile) -> None:
    """Train. The same command again in the same folder continues from its last checkpoint."""
    plan = plan_of(config, context.args)

    def work() -> None:
        from crepatrain.commands import fit as command

        summary(plan)
        command.fit(plan, screen)

    stoppable(work, screen)


@app.command(context_settings=OPTIONS)
def cache(context: typer.Context, config: ConfigFile) -> None:
    """Fill the caches of latents, captions and teacher features, without training."""
    plan = plan_of(config, context.args)

    def work() -> None:
        from crepatrain.commands.cache import cache as command

        command(plan, screen)

    stoppable(work, screen)


@app.command("validate-config", context_settings=OPTIONS)
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
    summary(plan := plan_of(config, context.args, online=False))
    validate(plan, screen)


@app.command("dry-run", context_settings=OPTIONS)
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
    plan = plan_of(config, [*context.args, *options_of_released_model(assume_model)], online=False)

    def work() -> None:
        from crepatrain.commands import dryrun
        from crepatrain.stopping import StopSignal

        shown = Screen(quiet=True) if as_json else screen
        if not as_json:
            summary(plan)
        with StopSignal() as stop:
            dataset = dryrun.dry_run(plan, shown, stop)
        if not (estimate_vram or remedies or as_json or fits is not None):
            return
        estimate = dryrun.estimate_vram(plan, dataset, shown, gigabytes=fits, everything=remedies)
        if as_json:
            typer.echo(json.dumps(estimate.as_json(), indent=2))
        if fits is not None and not dryrun.fits(plan, list(dataset.clips.buckets), estimate, fits, shown):
            sys.exit(EXIT_DOES_NOT_FIT)

    stoppable(work, screen)


@app.command(context_settings=OPTIONS)
def preflight(
    context: typer.Context,
    config: ConfigFile,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the very frames of every window that is trained.", show_default=False)
    ] = None,
    write_missing: Annotated[
        Path | None, typer.Option(help="Write a .csv list of the clips without a caption, to fill in.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object for each window, as JSON.")] = False,
) -> None:
    """Look at every window as it will be trained: crops, captions, black, frozen and repeated clips. Trains nothing."""
    plan = plan_of(config, context.args, online=False)

    def work() -> None:
        from crepatrain.commands import preflight as command
        from crepatrain.stopping import StopSignal

        shown = Screen(quiet=True) if as_json else screen
        with StopSignal() as stop:
            dataset, rows = command.preflight(plan, shown, stop, html=html, missing=write_missing)
        if as_json:
            typer.echo(command.as_json(rows, dataset))

    stoppable(work, screen)


@app.command(context_settings=OPTIONS)
def check(
    context: typer.Context,
    config: ConfigFile,
    fits: Annotated[float | None, typer.Option(min=0, help="GB of the card that it is for.", show_default=False)] = None,
) -> None:
    """All that can be known before a run in one go: validate-config, preflight and the memory estimate."""
    plan = plan_of(config, context.args, online=False)

    def work() -> None:
        from crepatrain.commands import dryrun
        from crepatrain.commands.preflight import preflight as look
        from crepatrain.stopping import StopSignal

        summary(plan)
        validate(plan, screen)
        with StopSignal() as stop:
            look(plan, screen, stop)
            dataset = dryrun.dry_run(plan, screen, stop)
        estimate = dryrun.estimate_vram(plan, dataset, screen, gigabytes=fits)
        if fits is not None and not dryrun.fits(plan, list(dataset.clips.buckets), estimate, fits, screen):
            sys.exit(EXIT_DOES_NOT_FIT)
        screen.say("ready: `crepatrain fit` starts it")

    stoppable(work, screen)


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

        command(runs, output, screen, with_map=with_map)

    if with_map:
        stoppable(work, screen)
    else:
        work()


@app.command()
def status(run: Annotated[Path, typer.Argument(help="Folder of a run (its output_dir).", show_default=False)]) -> None:
    """Show in five lines where a run stands, from its files only."""
    from crepatrain.commands.status import status as command

    command(run, screen)


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

    open_page(port, host, runs, data or [Path("clips")], screen)


cli_results.add_to(app)
