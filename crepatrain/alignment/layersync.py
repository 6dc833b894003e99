"""LayerSync, arXiv 2510.12581: a block learns from a deeper block of the same transformer, without a projector."""

from torch import Tensor

from crepatrain.alignment.projector import unit


def layersync_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mean cosine between a block's tokens and a deeper block's.

    Args:
        student: [B, S, D].
        teacher: [B, S, D]; gets no gradient.

    Returns:
        [B], not yet times the weight.
    """
    cosine = (unit(student.float()) * unit(teacher.detach().float())).sum(dim=-1)
    return -cosine.mean(dim=1)
