"""The caches of a plan's clips, filled ahead of training."""

from crepatrain.config.plan import Plan
from crepatrain.placement.devices import open_device
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import filled_caches
from crepatrain.preparing.preflight import read_datasets
from crepatrain.screen import Screen
from crepatrain.stopping import StopSignal


def cache(plan: Plan, screen: Screen) -> None:
    """Compute what `fit` would: latents, captions and teacher features of the clips that are trained on and of those held out.

    Raises:
        UserError: a model or a clip that can't be read, or a full disk or GPU.
        Stopped: a signal came; every entry written so far stays.
    """
    device = open_device(screen)
    with StopSignal() as stop:
        context = Context(plan, screen, device, stop)
        for dataset in filter(None, read_datasets(context)):
            caches = filled_caches(context, dataset, teacher=plan.config.crepa.crepa_enabled)
            screen.say(f"the caches of {len(caches.samples)} windows are full, in {caches.store.root}")
