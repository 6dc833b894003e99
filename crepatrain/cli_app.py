"""What all modules of the command line share: the app, the screen, and how a command gets its plan."""

import os
from pathlib import Path
from typing import Annotated

import typer

import crepatrain
from crepatrain.config.plan import Plan, read_plan
from crepatrain.config.summary import summarize
from crepatrain.console import Screen
from crepatrain.errors import UserError

app = typer.Typer(
    name="crepatrain",
    help="Fine-tune video diffusion transformers with CREPA, cross-frame representation alignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
screen = Screen(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks

OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="Config file, JSON or YAML. Its keys are options too: --crepa_lambda 0.3; `validate-config --schema` lists them.",
        show_default=False,
    ),
]


def plan_of(config: Path, options: list[str], *, online: bool = True) -> Plan:
    """The plan of a config file with options."""
    if str(config).startswith("--"):
        raise UserError(f"{config} stands before the config file", "write options after the config file")
    return read_plan(config, options, online=online)


def summary(plan: Plan) -> None:
    """What will happen, in words."""
    screen.rows(f"crepatrain {crepatrain.__version__}", summarize(plan))
    for warning in plan.warnings:
        screen.note(warning)
