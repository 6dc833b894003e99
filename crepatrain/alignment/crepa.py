"""The alignment loss: Eq. 6 of CREPA, arXiv 2506.09229."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from crepatrain.alignment.grids import blend, common_grid, match_frames, resample
from crepatrain.alignment.projector import ConvProjector, LinearProjector, standardize_teacher, unit
from crepatrain.geometry import TokenGrid
from crepatrain.neighbours import neighbour_weights
from crepatrain.tensors import PatchFeatures


@dataclass(frozen=True, eq=False)
class CrepaOutput:
    """What the loss and the console need of one forward.

    Attributes:
        loss: [B], minus the mean (or sum) over frames of align(f), not yet times the weight.
        alignment: [B], detached, the mean over frames of align(f). It can exceed 1.
        self_similarity: [B], detached, the mean over frames of sim(f, f).
    """

    loss: Tensor
    alignment: Tensor
    self_similarity: Tensor


class Crepa(nn.Module):
    """Aligns each frame's projected hidden states with the teacher's features of that frame and of its neighbours.

        sim(f, k) = mean over patches p of cos(projector(hidden[f, p]), teacher[k, p])
        align(f)  = sim(f, f) + sum over neighbours k of exp(-|k - f| / tau) * sim(f, k)

    Args:
        width: D of the transformer.
        feature_dim: E of the teacher.
        distance: d, capped at the number of frames - 1; 0 is per-frame REPA.
        tau: decay of a neighbour's weight.
        cumulative_neighbors: all neighbours up to d rather than those at d.
        spatial_align: patch on patch; otherwise frame means are compared.
        normalize_by_frames: mean over frames; otherwise sum.
        normalize_neighbour_sum: divide align(f) by the sum of frame f's weights.
        projector: linear (LayerNorm -> Linear) or conv (3x3, with a z-scored teacher).

    The arithmetic is that of the projector's parameters (fp32), with autocast off. The teacher gets no gradient.
    """

    def __init__(
        self,
        width: int,
        feature_dim: int,
        *,
        distance: int = 1,
        tau: float = 1.0,
        cumulative_neighbors: bool = False,
        spatial_align: bool = True,
        normalize_by_frames: bool = True,
        normalize_neighbour_sum: bool = False,
        projector: Literal["linear", "conv"] = "linear",
    ) -> None:
        super().__init__()
        assert spatial_align or projector == "linear"
        self.distance = distance
        self.tau = tau
        self.cumulative_neighbors = cumulative_neighbors
        self.spatial_align = spatial_align
        self.normalize_by_frames = normalize_by_frames
        self.normalize_neighbour_sum = normalize_neighbour_sum
        self.projector = (LinearProjector if projector == "linear" else ConvProjector)(width, feature_dim)

    def forward(self, tokens: Tensor, teacher: PatchFeatures, grid: TokenGrid) -> CrepaOutput:
        """Compare hidden states with features.

        Args:
            tokens: [B, S, D], S = T * h * w in frame-major raster order.
            teacher: [B, N, P, E] with its own grid.
            grid: of the tokens.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = next(self.projector.parameters()).dtype
            student = tokens.to(dtype).unflatten(1, (grid.t, grid.patches))
            student, features = match_frames(student, teacher.values.detach().to(dtype))
            student, features = self._meet(student, (grid.h, grid.w), features, teacher.grid)
            return self._compare(unit(student), unit(features))

    def _meet(
        self, student: Tensor, student_grid: tuple[int, int], features: Tensor, teacher_grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Student [B, T, P, D] and teacher [B, T, Q, E] -> both [B, T, M, E], not yet unit-normalised."""
        if not self.spatial_align:
            assert isinstance(self.projector, LinearProjector)
            return self.projector(student.mean(dim=2, keepdim=True)), features.mean(dim=2, keepdim=True)
        onto = common_grid(student_grid, teacher_grid)
        if isinstance(self.projector, ConvProjector):
            projected = resample(self.projector(student, student_grid), student_grid, onto)
            features = standardize_teacher(features)
        else:
            # A bilinear resample commutes with the Linear, not with the LayerNorm: between the two it moves the fewest numbers.
            projected = self.projector.linear(resample(self.projector.norm(student), student_grid, onto))
        return projected, resample(features, teacher_grid, onto)

    def _compare(self, student: Tensor, teacher: Tensor) -> CrepaOutput:
        """Unit vectors [B, T, M, E] of both sides -> the loss and the scores."""
        weights = neighbour_weights(student.shape[1], distance=self.distance, tau=self.tau, cumulative=self.cumulative_neighbors)
        if self.normalize_neighbour_sum:
            weights = [{k: weight / sum(row.values()) for k, weight in row.items()} for row in weights]
        align = (student * blend(teacher, weights)).sum(dim=-1).mean(dim=2)  # [B, T]
        with torch.no_grad():
            self_similarity = (student * teacher).sum(dim=-1).mean(dim=(1, 2))
        loss = -(align.mean(dim=1) if self.normalize_by_frames else align.sum(dim=1))
        return CrepaOutput(loss, align.detach().mean(dim=1), self_similarity)
