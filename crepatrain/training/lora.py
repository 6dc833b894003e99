"""The adapter: where it sits in a transformer, and its tensors."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from crepatrain.config.checks import unknown_target
from crepatrain.config.resolved import ResolvedLora
from crepatrain.errors import UserError
from crepatrain.specs import FamilySpec

ADAPTER = "default"


def target_modules(transformer: nn.Module, targets: Sequence[str] | str, spec: FamilySpec) -> list[str]:
    """The full names of the Linear layers inside the blocks that are adapted.

    Args:
        targets: a list of the ends of their names, a regex of full names, or all-linear.

    Raises:
        UserError: a target that matches no layer.
    """
    linears = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{spec.blocks}.")
    ]
    if targets == "all-linear":
        return linears
    if isinstance(targets, str):
        chosen = {targets: [name for name in linears if re.fullmatch(targets, name)]}
    else:
        chosen = {target: [name for name in linears if name == target or name.endswith(f".{target}")] for target in targets}
    for target, names in chosen.items():
        if not names:
            raise UserError.of([unknown_target(target, linears, regex=isinstance(targets, str))])
    wanted = {name for names in chosen.values() for name in names}
    return [name for name in linears if name in wanted]


def add_lora(transformer: Any, modules: Sequence[str], *, rank: int, alpha: float, dropout: float, rslora: bool = False) -> None:
    """Freeze a transformer and put an adapter on its modules, in fp32 whatever the dtype of the base."""
    transformer.requires_grad_(False)
    transformer.add_adapter(
        PeftLoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] - peft only divides it
            lora_dropout=dropout,
            target_modules=list(modules),
            use_rslora=rslora,
        ),
        adapter_name=ADAPTER,
    )
    for parameter in trainable_parameters(transformer):
        parameter.data = parameter.data.float()


def add_configured_lora(transformer: Any, config: ResolvedLora, spec: FamilySpec) -> list[str]:
    """Freeze a transformer and put the config's adapter on it, from torch's global generator.

    Returns:
        The full names of the adapted layers.

    Raises:
        UserError: a target that matches no layer.
    """
    modules = target_modules(transformer, config.targets, spec)
    add_lora(
        transformer,
        modules,
        rank=config.lora_rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        rslora=config.lora_use_rslora,
    )
    return modules


def put_on_cpu(transformer: nn.Module) -> None:
    """Give the adapter of a transformer on the meta device uninitialised tensors on the CPU; the rest stays as it is."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for part in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
                part.to_empty(device="cpu")


def leave_casts_to_autocast(transformer: nn.Module) -> None:
    """Keep peft from casting a layer's input to fp32, which autocast would cast back: the same numbers with less memory."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that an optimizer updates."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def is_adapted(transformer: nn.Module) -> bool:
    """Whether an adapter is trained rather than the transformer's own weights."""
    return any(isinstance(module, LoraLayer) for module in transformer.modules())


def trained_state(transformer: nn.Module) -> dict[str, Tensor]:
    """What training updates, as a checkpoint keeps it: the adapter's tensors under peft's names, or all of the transformer's."""
    if not is_adapted(transformer):
        return transformer.state_dict()
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER)


def load_trained_state(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all of what `trained_state` gave."""
    if not is_adapted(transformer):
        transformer.load_state_dict(state)
        return
    result = set_peft_model_state_dict(transformer, dict(state), adapter_name=ADAPTER)
    assert not result.unexpected_keys, result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key], result.missing_keys


def live_adapter(
    transformer: nn.Module, adapter: str = ADAPTER, weights: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Per adapted module lora_A [r, in], lora_B [out, r], or of a convolution, and the scale that is applied to lora_B lora_A.

    Args:
        weights: what `trained_state` gave, in place of what the transformer holds now.
    """
    live = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            if weights is None:
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            else:
                down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            assert isinstance(down, Tensor)
            assert isinstance(up, Tensor)
            live[name] = (down.detach(), up.detach(), module.scaling[adapter])
    return live


def baked_adapter(transformer: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Per adapted module lora_A [r, in] and lora_B [out, r] with the adapter's scale inside lora_B, on the CPU.

    Args:
        weights: what `trained_state` gave, in place of what the transformer holds now.
    """
    return {
        name: (down.cpu().float().contiguous(), (up.cpu().float() * scale).contiguous())
        for name, (down, up, scale) in live_adapter(transformer, weights=weights).items()
    }


@torch.no_grad()
def copy_into_adapter(transformer: nn.Module, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Copy an adapter as `baked_adapter` gives it into the live adapter, which then has the same effect at its own scale.

    Args:
        adapter: per adapted module lora_A [r, in] and lora_B [out, r], with their scale inside lora_B.
    """
    for name, (down, up, scale) in live_adapter(transformer).items():
        new_down, new_up = adapter[name]
        down.copy_(new_down)
        up.copy_(new_up / scale)


def unknown_settings(names: Iterable[str]) -> set[str]:
    """Those of an adapter's settings that the installed peft does not know."""
    return set(names) - {field.name for field in dataclasses.fields(PeftLoraConfig)}
