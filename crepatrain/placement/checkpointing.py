"""Gradient checkpointing of the blocks: all of a block computed again in the backward pass, or all but its self-attention."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from crepatrain.config.sections import LoopConfig
from crepatrain.families.base import Family
from crepatrain.placement.block_inputs import BlockInputs


def checkpoint_blocks(config: LoopConfig, family: Family, transformer: Any, inputs: BlockInputs | None = None) -> None:
    """Set the config's gradient checkpointing on a transformer of diffusers; nothing where it is off.

    Args:
        inputs: what keeps the blocks' inputs in host memory, with `checkpoint_offload`.
    """
    if not config.gradient_checkpointing:
        return
    contexts: Any = noop_context_fn
    if config.gradient_checkpointing == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)

    def computed_again(block: Any, hidden: Any, *others: Any) -> Any:
        with inputs.of(block, hidden) if inputs else contextlib.nullcontext():
            return checkpoint(block.__call__, hidden, *others, use_reentrant=False, context_fn=contexts)

    transformer.enable_gradient_checkpointing(computed_again)
    if config.nested_checkpointing:
        for block in family.blocks(transformer):
            for name in family.spec.block_parts:
                part = getattr(block, name)
                part.forward = functools.partial(_part_again, part.forward)


def _part_again(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A part of a block, computed again where its own backward begins: only one part's activations are there at a time."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)

    # By place, and no tensor in what is called: checkpoint holds on to all but what it is given by place, for as long as all of
    # the block waits to be computed again.
    count, names = len(inputs), tuple(named)

    def by_place(*values: Any) -> Any:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return checkpoint(by_place, *inputs, *named.values(), use_reentrant=False)


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
