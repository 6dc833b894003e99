"""Adding adapters into the weights of the transformer that they are for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, recognise
from crepatrain.adapters.checks import check_expert
from crepatrain.adapters.loading import load_scaled
from crepatrain.errors import Problem, UserError
from crepatrain.specs import FAMILIES, Expert

# Per layer lora_A [r, in] and lora_B [out, r], or those of a convolution, with their scale inside lora_B.
ScaledAdapter = Mapping[str, tuple[Tensor, Tensor]]


def common_target(files: Sequence[AdapterFile]) -> tuple[str, Expert | None]:
    """The family and the expert that all files are for.

    Raises:
        UserError: they are not for the same one, or a file is of no known family.
    """
    families: dict[str, Path] = {file.recipe().get("family") or recognise(file)[0].family.spec.name: file.path for file in files}
    if len(families) > 1:
        what = " and ".join(f"{path} of {FAMILIES[name].title}" for name, path in families.items())
        raise UserError(f"the adapters are of several models: {what}", "merge only adapters of one model")
    experts: dict[Expert, Path] = {file.expert: file.path for file in files if file.expert}
    if len(experts) > 1:
        what = " and ".join(f"{path} for the {expert}-noise expert" for expert, path in experts.items())
        raise UserError(f"the adapters are for both experts: {what}", "merge the adapters of each expert separately")
    return next(iter(families)), next(iter(experts), None)


def load_all_scaled(files: Sequence[AdapterFile], model: Model) -> list[ScaledAdapter]:
    """What `load_scaled` gives for every file.

    Raises:
        UserError: with every reason why one of them can't be loaded completely, or is not for this base.
    """
    loaded: list[ScaledAdapter] = []
    problems = []
    for file in files:
        problems += [Problem(f"{file.path}: {problem.what}", problem.fix) for problem in check_expert(file, model)]
        if model.family.variant.expert and not file.expert:
            what = f"{file.path}: neither its name nor its header says for which of the two experts of {model.title} it is"
            problems.append(Problem(what, "end its name in high_noise or low_noise"))
        try:
            loaded.append(load_scaled(file, model, str(file.path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return loaded


@torch.no_grad()
def add_adapters(
    transformer: nn.Module, adapters: Sequence[ScaledAdapter], strengths: Sequence[float], dtype: torch.dtype
) -> dict[str, float]:
    """Add strength * lora_B lora_A of every adapter to the weights of its layers, in the dtype of the transformer.

    Args:
        dtype: in which the weights will be written.

    Returns:
        Per adapted layer the share of weights that are in that dtype what they were before.
    """
    modules: Mapping[str, Any] = dict(transformer.named_modules())
    before: dict[str, Tensor] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for layer, (down, up) in adapter.items():
            weight = modules[layer].weight
            before.setdefault(layer, weight.detach().to(dtype).clone())
            weight.add_((up.flatten(1) @ down.flatten(1)).view_as(weight) * strength)
    return {layer: (modules[layer].weight.to(dtype) == old).float().mean().item() for layer, old in before.items()}
