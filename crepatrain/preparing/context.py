"""What every part of a command works with."""

from dataclasses import dataclass

import torch

from crepatrain.config.plan import Plan
from crepatrain.screen import Screen
from crepatrain.stopping import StopSignal


@dataclass(frozen=True, eq=False)
class Context:
    """One command at work: its plan, where its messages go, where it computes, and whether it was asked to stop."""

    plan: Plan
    screen: Screen
    device: torch.device
    stop: StopSignal
