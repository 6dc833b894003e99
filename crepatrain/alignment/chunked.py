"""Scores over chunks of frames, their gradient taken on the way, so that no fp32 intermediate of a whole clip is ever held."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens of one chunk: enough to fill a GPU, few enough that a chunk's intermediates stay far below those of a clip.
_CHUNK_TOKENS = 2048

# Hidden states [1, n, P, D] of some frames of a sample, the sample, the frames -> the sums over them of align(f) and sim(f, f).
Score = Callable[[Tensor, int, range], tuple[Tensor, Tensor]]


def summed_scores(student: Tensor, score: Score, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The sum over frames of align(f), with its gradient, and of sim(f, f), without; [B] each.

    Backward recomputes nothing: the gradient is computed with the value, chunk by chunk, and waits in the student's dtype for the
    weight that backward brings. Under no_grad there is no such work.

    Args:
        student: [B, T, P, D].
        score: of a chunk; its gradient may reach the chunk and `parameters`.
    """
    if torch.is_grad_enabled():
        return _SummedScores.apply(student, score, *parameters)  # type: ignore[return-value]
    aligned, similar = student.new_zeros((2, student.shape[0]), dtype=parameters[0].dtype)
    for chunk, sample, frames in _chunks(student):
        align, similarity = score(chunk, sample, frames)
        aligned[sample] += align
        similar[sample] += similarity
    return aligned, similar


def _chunks(student: Tensor) -> Iterator[tuple[Tensor, int, range]]:
    batch, count, patches = student.shape[:3]
    step = max(_CHUNK_TOKENS // patches, 1)
    for sample in range(batch):
        for first in range(0, count, step):
            frames = range(first, min(first + step, count))
            yield student[sample : sample + 1, frames.start : frames.stop], sample, frames


class _SummedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, score: Score, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        batch, dtype = student.shape[0], parameters[0].dtype
        aligned, similar = student.new_zeros((2, batch), dtype=dtype)
        of_student = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        of_parameters = [parameter.new_zeros((batch, *parameter.shape)) for parameter in wanted]
        for chunk, sample, frames in _chunks(student):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_(of_student is not None)
                # Not the leaf itself: tools that follow modules through backward, as torch's FLOP counter does, refuse one.
                align, similarity = score(leaf.view_as(leaf), sample, frames)
                sources = [*([leaf] if of_student is not None else []), *wanted]
                gradients = list(torch.autograd.grad(align, sources))
            aligned[sample] += align.detach()
            similar[sample] += similarity
            if of_student is not None:
                of_student[sample, frames.start : frames.stop] = gradients.pop(0)[0]
            for total, gradient in zip(of_parameters, gradients, strict=True):
                total[sample] += gradient
        ctx.save_for_backward(of_student, *of_parameters)
        ctx.mark_non_differentiable(similar)
        return aligned, similar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = gradients[0]
        of_student, *of_parameters = ctx.saved_tensors
        if of_student is not None:
            factor = weight.to(of_student.dtype).view(-1, 1, 1, 1)
            # It is as large as the hidden states: scaled in place unless the graph is to be run again.
            kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
            of_student = of_student * factor if kept else of_student.mul_(factor)
        weighted = iter([torch.tensordot(weight, total, dims=1) for total in of_parameters])
        return of_student, None, *(next(weighted) if needed else None for needed in ctx.needs_input_grad[2:])
