"""Whether a config can be trained: by itself, and in the folder that it names."""

from pathlib import Path

from crepatrain.config.plan import Plan
from crepatrain.records.continuing import find_continuation, keep_begun
from crepatrain.records.layout import RunLayout
from crepatrain.screen import Screen


def validate(plan: Plan, screen: Screen) -> None:
    """Say whether a plan can be trained in its output_dir, and from where. Needs no torch.

    Raises:
        UserError: `fit` would refuse because of what the folder holds.
    """
    plan = keep_begun(plan)
    found = find_continuation(RunLayout(Path(plan.config.loop.output_dir)), plan.config)
    for note in found.notes:
        screen.note(note)
    if found.checkpoint:
        screen.say(f"fit goes on from {found.checkpoint}")
    screen.say("the config is valid")
