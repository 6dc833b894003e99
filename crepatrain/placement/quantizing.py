"""A frozen base in 8 or 4 bits: the Linear layers inside the blocks, one at a time, so that little beside the result is held.

Quantised are weights alone, and what is computed with them stays in the compute data type: so the gradient reaches a layer's
input, which it does not where torchao quantises activations too. Every layer is dequantised where it is used.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F

from crepatrain.config.fields import Quantization, TextQuantization
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.families.reading import StoredTensors
from crepatrain.placement.inference import block_lists
from crepatrain.placement.placing import trim_host_memory

# Of the layers inside blocks those that scale and shift a whole clip: few numbers with much effect.
_LEFT = ("norm", "modulation")
_NF4_BLOCK = 64
_AT_ONCE = 1 << 19  # numbers of a weight


class TorchaoLinear(nn.Linear):
    """A frozen Linear layer with a weight of torchao's, which autocast does not see: it would compute in its input's data type.

    That is fp32 behind a norm on CUDA, at twice the memory and several times the work.

    Args:
        layer: with a weight [out, in].
        weight: what torchao has made of it.
    """

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        kind = input.device.type
        cast = input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
        return F.linear(cast, self.weight, self.bias)


class Nf4Linear(nn.Linear):
    """A frozen Linear layer whose weight is kept in bitsandbytes' 4-bit normal floats, with a scale for every 64 numbers.

    bitsandbytes' own layer keeps the weight of its forward out of autograd's sight, so that memory that has changed since then is
    taken for it in the backward pass; here autograd holds what it needs.

    Args:
        layer: with a weight [out, in]; on the meta device no numbers are computed.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self._dtype = layer.weight.dtype
        count, device = layer.weight.numel(), layer.weight.device
        if layer.weight.is_meta:
            packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
            scales = torch.empty(-(-count // _NF4_BLOCK), device=device)
        else:
            from bitsandbytes.functional import quantize_4bit

            settings: dict[str, Any] = {"blocksize": _NF4_BLOCK, "quant_type": "nf4", "compress_statistics": False}
            parts = [quantize_4bit(part, **settings) for part in _parts(layer.weight)]
            packed, scales = (torch.cat(values) for values in zip(*((data, state.absmax) for data, state in parts), strict=True))
        # As int8, the one data type of weights to which T5 does not cast its activations.
        self.weight = nn.Parameter(packed.view(torch.int8), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)  # no buffer, so that it goes wherever the weight goes
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return F.linear(input, self.dequantized().to(input.dtype), self.bias)

    def dequantized(self) -> Tensor:
        """The weight [out, in]."""
        import bitsandbytes  # noqa: F401 - its operators are torch's once it is imported

        count = self.out_features * self.in_features
        # bitsandbytes' kernel for CPUs takes each row for whole blocks, and gives wrong numbers of a row that ends inside one.
        shape = (count // _NF4_BLOCK, _NF4_BLOCK) if count % _NF4_BLOCK == 0 else (count,)
        packed = self.weight.view(torch.uint8)
        numbers = torch.ops.bitsandbytes.dequantize_4bit(packed, self.scales, _NF4_BLOCK, "nf4", shape, self._dtype)
        return numbers.view(self.out_features, self.in_features)


def quantize_blocks(family: Family, transformer: Any, how: Quantization) -> None:
    """Quantise the Linear layers inside the blocks of a frozen transformer, where they are; `none` leaves all as it is."""
    for name in _names(transformer):
        if is_quantized(family, name, transformer.get_submodule(name)):
            quantize_layer(transformer, name, how)


def quantize_text_model(model: nn.Module, how: TextQuantization, device: torch.device) -> None:
    """Quantise the Linear layers inside the blocks of a text encoder, each on the device, and back to where the model is."""
    if how == "none":
        return
    lists = {id(blocks) for blocks in block_lists(model)}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in lists)
    for name in _names(model):
        layer = model.get_submodule(name)
        if name.startswith(prefixes) and isinstance(layer, nn.Linear):
            home = layer.weight.device
            layer.to(device)
            quantize_layer(model, name, how)
            model.get_submodule(name).to(home)
            trim_host_memory()


def _names(transformer: Any) -> list[str]:
    """Of all modules. The modules themselves would be held, with their weights, when others have taken their places."""
    return [name for name, _ in transformer.named_modules()]


def is_quantized(family: Family, name: str, module: nn.Module) -> bool:
    """Whether a module of a transformer, by its full name, is one that is quantised."""
    inside = name.startswith(f"{family.spec.blocks}.") and isinstance(module, nn.Linear)
    return inside and not any(word in name for word in _LEFT)


def quantize_layer(transformer: Any, name: str, how: Quantization) -> None:
    """Quantise one Linear layer of a model, by its full name, where it is."""
    layer = transformer.get_submodule(name)
    layer.requires_grad_(False)
    if how == "nf4":
        transformer.set_submodule(name, Nf4Linear(layer))
    elif how != "none":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        kinds = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
        made = []
        for part in _parts(layer.weight):
            rows = nn.Linear(layer.in_features, len(part), bias=False, device="meta")
            rows.weight = nn.Parameter(part, requires_grad=False)
            quantize_(rows, kinds[how](set_inductor_config=False))
            made.append(rows.weight)
        transformer.set_submodule(name, TorchaoLinear(layer, _joined(made)))


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows [n, in] of a weight [out, in] at a time, as every row has a scale of its own: the work in fp32 stays small."""
    rows = -(-_AT_ONCE // weight.shape[1])
    return weight.detach().split(-(-rows // _NF4_BLOCK) * _NF4_BLOCK)


def _joined(parts: list[Any]) -> Any:
    """A quantised weight out of its rows."""
    if len(parts) == 1:
        return parts[0]
    names, settings = parts[0].__tensor_flatten__()
    inner = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    shape = (sum(len(part) for part in parts), parts[0].shape[1])
    return type(parts[0]).__tensor_unflatten__(inner, settings, shape, (shape[1], 1))


def load_quantized(
    family: Family,
    path: str,
    dtype: torch.dtype,
    how: Quantization,
    device: torch.device,
    *,
    stays: bool = True,
    part: str | None = None,
) -> Any:
    """A transformer whose Linear layers inside the blocks are quantised on the device, each as soon as it is read.

    Args:
        path: a local pipeline folder.
        dtype: of the weights that are not quantised, and of what is computed with the others.
        stays: whether what is quantised stays on the device, rather than that a ring of blocks has it in host memory.
        part: the transformer's folder in there; None: that of the one that is trained.

    Returns:
        The transformer of diffusers in eval mode, on the CPU but for what stays on the device.

    Raises:
        UserError: its files lack a tensor.
    """
    with init_empty_weights(include_buffers=False):
        transformer = family.transformer_class.from_config(dict(family.checkpoint.transformer))
    stored = StoredTensors(path, part or family.variant.transformer)
    keep = tuple(transformer._keep_in_fp32_modules or ())
    for name in _names(transformer):
        module = transformer.get_submodule(name)
        on = device if is_quantized(family, name, module) else torch.device("cpu")
        tensors = {**module._parameters, **{key: module._buffers[key] for key in module._buffers if f"{name}.{key}" in stored}}
        for key, empty in tensors.items():
            if empty is None:
                continue
            full = f"{name}.{key}" if name else key
            if full not in stored:
                raise UserError(f"{stored.folder} can't be loaded: it lacks {full}", "download this part again")
            tensor = stored.read(full, torch.float32 if any(word in keep for word in full.split(".")) else dtype).to(on)
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[key] = tensor
        if is_quantized(family, name, module):
            quantize_layer(transformer, name, how)
            if not stays:
                transformer.get_submodule(name).to("cpu")
            trim_host_memory()
    return transformer.eval()
