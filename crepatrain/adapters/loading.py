"""Adapters in memory: a file's tensors at their strength, and a transformer without weights that carries an adapter."""

from pathlib import Path

from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, read_adapter
from crepatrain.adapters.checks import check_content, check_layers
from crepatrain.adapters.compatibility import diffusers_compatibility
from crepatrain.config.resolved import ResolvedLora
from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.training.checkpoint_content import read_trained
from crepatrain.training.lora import add_configured_lora, add_lora, live_adapter, load_trained_state, put_on_cpu


def load_scaled(file: AdapterFile, model: Model, label: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer lora_A [r, in] and lora_B [out, r], or those of a convolution, in fp32, with the scale inside lora_B.

    The scale is the one that diffusers applies; of a file that diffusers does not load, the one of its .alpha, as ComfyUI has it.

    Args:
        label: how messages name the file.

    Raises:
        UserError: with every reason why the file can't be loaded completely.
    """
    problems = [*check_layers(file, model), *check_content(file, model, shapes=True)]
    found = diffusers_compatibility(file, model)
    if "lora_adapter_metadata" in file.metadata and (found.refusal or found.ignored) and not problems:
        what = f"its strength is unknown, as it has lora_adapter_metadata and diffusers {found.summary}"
        problems.append(Problem(what, "put the scale inside lora_B, and leave lora_adapter_metadata out"))
    if problems:
        raise UserError.of([Problem(f"{label}: {problem.what}", problem.fix) for problem in problems])
    loaded: dict[str, tuple[Tensor, Tensor]] = {}
    for pair in file.pairs.values():
        layer = model.find(pair)
        assert layer is not None
        assert pair.down is not None
        assert pair.up is not None
        loaded[layer] = pair.down.float(), pair.up.float() * found.strengths.get(layer, pair.scale)
    return loaded


def load_initial_adapter(path: Path, family: Family, transformer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What `load_scaled` gives for init_adapter, checked against the fresh adapter of a run.

    Args:
        transformer: with the fresh adapter, on any device.

    Raises:
        UserError: the file can't be loaded completely, or its layers or ranks are not those of the run.
    """
    label = f"init_adapter={path}"
    loaded = load_scaled(read_adapter(path), Model(family, transformer, family.variant.title), label)
    live = live_adapter(transformer)
    unexpected, missing = sorted(loaded.keys() - live.keys()), sorted(live.keys() - loaded.keys())
    for names, what in ((unexpected, "is not in this run's lora_targets"), (missing, "is not in the file")):
        if names:
            raise UserError(f"{label}: {names[0]} {what} ({len(names)} in all)", "set the lora_targets that it was trained with")
    for layer, (down, _, _) in live.items():
        rank = loaded[layer][0].shape[0]
        if rank != down.shape[0]:
            raise UserError(f"{label}: {layer} has rank {rank}, and this run's {down.shape[0]}", f"set lora_rank to {rank}")
    return loaded


def adapter_of_checkpoint(config: ResolvedLora, family: Family, checkpoint: Path, *, average: bool) -> nn.Module:
    """A transformer on the meta device with the adapter of a checkpoint on the CPU.

    Args:
        config: of the run's adapter.
        average: the weights' average in place of the weights.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, or its adapter is not this run's.
    """
    transformer = family.empty_transformer()
    add_configured_lora(transformer, config, family.spec)
    put_on_cpu(transformer)
    load_trained_state(transformer, read_trained(checkpoint, transformer, average=average))
    return transformer


def adapter_of_file(family: Family, file: AdapterFile) -> nn.Module:
    """A transformer on the meta device with the adapter of an exported file on the CPU, whose scale is 1."""
    transformer = family.empty_transformer()
    model = Model(family, transformer, family.variant.title)
    layers = {layer: pair for pair in file.pairs.values() if (layer := model.find(pair))}
    rank = max(file.ranks)
    add_lora(transformer, list(layers), rank=rank, alpha=float(rank), dropout=0.0)
    put_on_cpu(transformer)
    for layer, (down, up, _) in live_adapter(transformer).items():
        pair = layers[layer]
        assert pair.down is not None
        assert pair.up is not None
        down.copy_(pair.down)
        up.copy_(pair.up)
    return transformer


def trained_transformer(family: Family, checkpoint: Path, *, average: bool) -> nn.Module:
    """A whole transformer with the weights of a checkpoint, on the CPU.

    Args:
        average: the weights' average in place of the weights.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, or its weights are not this transformer's.
    """
    transformer = family.empty_transformer()
    transformer.load_state_dict(read_trained(checkpoint, transformer, average=average), assign=True)
    return transformer
