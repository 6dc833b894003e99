"""Everything that can be said of a run without its weights."""

from crepatrain.commands import preflight
from crepatrain.commands.stopping import StopSignal
from crepatrain.config.plan import Plan
from crepatrain.console import Screen
from crepatrain.training import build
from crepatrain.training.lora import trainable_parameters


def dry_run(plan: Plan, screen: Screen, stop: StopSignal) -> None:
    """Look at the clips, build the modules on the meta device, and print what a run would use.

    Raises:
        UserError: what `fit` would refuse before it loads weights.
    """
    dataset = preflight.look_at_clips(plan, screen, stop)
    family = build.build_family(plan)
    transformer = family.empty_transformer()
    build.adapt(plan, family, transformer)
    trainable = {
        "transformer" if plan.config.model_type == "full" else "adapter": sum(
            p.numel() for p in trainable_parameters(transformer)
        )
    }
    if plan.config.crepa_enabled:
        trainable["projector"] = sum(p.numel() for p in build.build_crepa(plan).parameters())
    preflight.describe(plan, dataset, screen, trainable)
