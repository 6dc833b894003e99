"""What can be wrong with the keys that save GPU memory, with each other and with what is trained."""

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sections import LoopConfig
from crepatrain.errors import Problem


def check_checkpointing(config: LoopConfig) -> list[Problem]:
    """A compiled block is one operator, of which nothing can be kept."""
    if config.gradient_checkpointing != "selective" or not config.compile:
        return []
    what = "gradient_checkpointing=selective with compile=true: the attentions inside a compiled block can't be kept"
    return [Problem(what, "set gradient_checkpointing to true, or compile to false", ("gradient_checkpointing", "compile"))]


def check_offload(config: ResolvedConfig, depth: int) -> list[Problem]:
    """Weights in host memory are frozen, come once more for the backward pass, and are those of blocks that there are."""
    offload = config.loop.block_offload
    if not offload:
        return []
    what, problems = f"block_offload={offload}", []
    if config.model.model_type == "full":
        keys = ("block_offload", "model_type")
        reason = "it is for frozen weights, and model_type=full trains all of them"
        problems.append(Problem(f"{what}: {reason}", "set block_offload to 0, or model_type to lora", keys))
    if config.loop.gradient_checkpointing is False:
        keys = ("block_offload", "gradient_checkpointing")
        reason = "without gradient_checkpointing the backward pass needs all blocks' weights at once"
        problems.append(Problem(f"{what}: {reason}", "set gradient_checkpointing to true or selective", keys))
    if offload != "auto" and offload > depth:
        problems.append(Problem(f"{what}: the transformer has {depth} blocks", f"use {depth} or less", ("block_offload",)))
    return problems
