"""Gradient checkpointing of the blocks: all of a block computed again in the backward pass, or all but its self-attention."""

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts

from crepatrain.config.sections import LoopConfig


def checkpoint_blocks(config: LoopConfig, transformer: Any) -> None:
    """Set the config's gradient checkpointing on a transformer of diffusers; nothing where it is off."""
    if config.gradient_checkpointing == "selective":
        transformer.enable_gradient_checkpointing(_all_but_attention)
    elif config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()


def _all_but_attention(block: Any, *inputs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_attention(_context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Keep what attention among a clip's tokens gives: most of the work, for a tensor as large as the hidden states.

    Attention to a caption's few tokens would take the same memory, and is little work.
    """
    if not _is_attention(str(operator)):
        return CheckpointPolicy.PREFER_RECOMPUTE
    query, key = arguments[:2]
    return CheckpointPolicy.MUST_SAVE if 2 * key.numel() >= query.numel() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_attention(name: str) -> bool:
    """Whether an operator is a fused attention kernel's forward: torch's, flash-attn's, FlashAttention 3's or xformers'.

    A kernel that is no operator of torch, and attention in several operators, are computed again, which is as exact.
    """
    fused = "scaled_dot_product" in name or "flash" in name or "efficient_attention" in name
    return fused and "backward" not in name
