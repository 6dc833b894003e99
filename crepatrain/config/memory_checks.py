"""What can be wrong with the keys that save GPU memory, with each other and with what is trained."""

from importlib.util import find_spec

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sections import LoopConfig
from crepatrain.errors import Problem

# What `memory: auto` chooses.
MEMORY_KEYS = frozenset(
    {"gradient_checkpointing", "block_offload", "checkpoint_offload", "nested_checkpointing", "base_quantization"}
)


def open_keys(config: LoopConfig) -> frozenset[str]:
    """The keys whose values are chosen for the GPU at hand: with `memory: auto` those that are not written."""
    chosen = MEMORY_KEYS - config.model_fields_set if config.memory == "auto" else frozenset[str]()
    return chosen | {"block_offload"} if config.block_offload == "auto" else chosen


def check_checkpointing(config: LoopConfig) -> list[Problem]:
    """A compiled block is one operator, of which nothing can be kept; the other keys change what gradient checkpointing does."""
    how, problems = config.gradient_checkpointing, []
    if how == "selective" and config.compile:
        what = "gradient_checkpointing=selective with compile=true: the attentions inside a compiled block can't be kept"
        fix = "set gradient_checkpointing to true, or compile to false"
        problems.append(Problem(what, fix, ("gradient_checkpointing", "compile")))
    if config.checkpoint_offload and not how:
        what = "checkpoint_offload=true with gradient_checkpointing=false: then it is not the blocks' inputs that are kept"
        fix = "set gradient_checkpointing to true or selective, or checkpoint_offload to false"
        problems.append(Problem(what, fix, ("checkpoint_offload", "gradient_checkpointing")))
    if config.nested_checkpointing and how is not True:
        what = (
            f"nested_checkpointing=true with gradient_checkpointing={str(how).lower()}: it is for blocks of which nothing is kept"
        )
        fix = "set gradient_checkpointing to true, or nested_checkpointing to false"
        problems.append(Problem(what, fix, ("nested_checkpointing", "gradient_checkpointing")))
    if config.nested_checkpointing and config.compile:
        what = "nested_checkpointing=true with compile=true: the compiler decides what is kept inside a block"
        fix = "set one of them to false"
        problems.append(Problem(what, fix, ("nested_checkpointing", "compile")))
    return problems


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


def check_quantization(config: ResolvedConfig) -> list[Problem]:
    """A quantised base is frozen, and its layers are dequantised again in the backward pass, one block at a time."""
    how, problems = config.loop.base_quantization, []
    what, leave = f"base_quantization={how}", "or base_quantization to none"
    if how == "none":
        return []
    if config.model.model_type == "full":
        keys, fix = ("base_quantization", "model_type"), f"set model_type to lora, {leave}"
        problems.append(Problem(f"{what} with model_type=full: weights in fewer bits can't be trained", fix, keys))
    if not config.loop.gradient_checkpointing:
        keys = ("base_quantization", "gradient_checkpointing")
        reason = "every block's weights would be held in full until the backward pass"
        fix = f"set gradient_checkpointing to true, {leave}"
        problems.append(Problem(f"{what} with gradient_checkpointing=false: {reason}", fix, keys))
    return problems + check_package(what, how, "base_quantization")


def check_text_encoder(config: LoopConfig) -> list[Problem]:
    """What keeps a text encoder in 4 bits is a package of its own."""
    how = config.text_encoder_quantization
    return check_package(f"text_encoder_quantization={how}", how, "text_encoder_quantization")


def check_package(what: str, how: str, *keys: str) -> list[Problem]:
    """The package that keeps weights in 4 bits is installed.

    Args:
        what: the setting, as a message names it; how: its value.
    """
    if how != "nf4" or find_spec("bitsandbytes"):
        return []
    return [Problem(f"{what}: bitsandbytes is not installed", 'run pip install "crepatrain[8bit]", or use int8', keys)]
