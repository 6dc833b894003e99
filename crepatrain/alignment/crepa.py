"""The alignment loss: Eq. 6 of CREPA, arXiv 2506.09229."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from crepatrain.alignment.chunked import summed_scores
from crepatrain.alignment.grids import blend, common_grid, match_frames, resample
from crepatrain.alignment.precision import own_precision
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
        spatial_align: patch on patch; otherwise the means of a frame's projected patches and of its features are compared, each
            taken on its own grid.
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
        with own_precision(tokens.device):
            student = tokens.unflatten(1, (grid.t, grid.patches))
            student, features = match_frames(student, teacher.values.detach())
            count = student.shape[1]
            weights = self._weights(count)
            onto = common_grid((grid.h, grid.w), teacher.grid)

            def score(chunk: Tensor, sample: int, frames: range) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    blended, own = self._teacher(features[sample], weights, frames, teacher.grid, onto)
                projected = unit(self._project(chunk, (grid.h, grid.w), onto))
                patches = projected.shape[2]
                with torch.no_grad():
                    similarity = (projected * own).sum(dim=-1).sum() / patches
                return (projected * blended).sum(dim=-1).sum() / patches, similarity

            aligned, similar = summed_scores(student, score, list(self.projector.parameters()))
        alignment = aligned / count
        return CrepaOutput(-(alignment if self.normalize_by_frames else aligned), alignment.detach(), similar / count)

    @torch.no_grad()
    def patch_similarity(self, tokens: Tensor, teacher: PatchFeatures, grid: TokenGrid) -> Tensor:
        """The cosine of every patch with its own features, whose mean is sim(f, f): [B, T, rows, columns], where both grids meet.

        Args:
            tokens, teacher, grid: as in `forward`.
        """
        with own_precision(tokens.device):
            student = tokens.unflatten(1, (grid.t, grid.patches))
            student, features = match_frames(student, teacher.values)
            onto = common_grid((grid.h, grid.w), teacher.grid)
            rows, columns = onto if self.spatial_align else (1, 1)
            alone = [{frame: 1.0} for frame in range(student.shape[1])]
            similar = student.new_empty((*student.shape[:2], rows, columns), dtype=torch.float32)
            for sample in range(student.shape[0]):
                for frame in range(student.shape[1]):
                    chunk = student[sample : sample + 1, frame : frame + 1]
                    _, own = self._teacher(features[sample], alone, range(frame, frame + 1), teacher.grid, onto)
                    projected = unit(self._project(chunk, (grid.h, grid.w), onto))
                    similar[sample, frame] = (projected * own).sum(dim=-1).view(rows, columns)
        return similar

    def _weights(self, frames: int) -> list[dict[int, float]]:
        rows = neighbour_weights(frames, distance=self.distance, tau=self.tau, cumulative=self.cumulative_neighbors)
        if not self.normalize_neighbour_sum:
            return rows
        return [{k: weight / sum(row.values()) for k, weight in row.items()} for row in rows]

    def _project(self, student: Tensor, grid: tuple[int, int], onto: tuple[int, int]) -> Tensor:
        """Hidden states [1, n, P, D] on their own grid -> [1, n, M, E] on the grid where both meet."""
        student = student.to(next(self.projector.parameters()).dtype)
        if isinstance(self.projector, ConvProjector):
            return resample(self.projector(student, grid), grid, onto)
        if not self.spatial_align:
            # What is averaged is projected: the mean commutes with the Linear, not with the LayerNorm.
            return self.projector.linear(self.projector.norm(student).mean(dim=2, keepdim=True))
        # A bilinear resample commutes with the Linear, not with the LayerNorm: between the two it moves the fewest numbers.
        return self.projector.linear(resample(self.projector.norm(student), grid, onto))

    def _teacher(
        self, features: Tensor, weights: list[dict[int, float]], frames: range, grid: tuple[int, int], onto: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Features [T, Q, E] of a sample -> of some frames their neighbours, blended, and their own, unit [1, n, M, E]."""
        seen = sorted({k for f in frames for k in weights[f]})
        values = torch.stack([features[k] for k in seen]).unsqueeze(0).to(next(self.projector.parameters()).dtype)
        if isinstance(self.projector, ConvProjector):
            values = standardize_teacher(values)
        values = resample(values, grid, onto) if self.spatial_align else values.mean(dim=2, keepdim=True)
        rows = dict(zip(seen, unit(values).unbind(dim=1), strict=True))
        return torch.stack([blend(rows, weights[f]) for f in frames], dim=1), torch.stack([rows[f] for f in frames], dim=1)
