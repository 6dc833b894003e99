"""Sizes of a video on its way through a model: pixels, latents, tokens. Plain ints, no tensors."""

from dataclasses import dataclass

from crepatrain.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """The video tokens of one clip, in the order in which the transformer keeps them (frame-major raster).

    Attributes:
        t, h, w: token frames, rows, columns.
        pixel_spans: per token frame the pixel frames [first, last) that it encodes.
    """

    t: int
    h: int
    w: int
    pixel_spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        assert len(self.pixel_spans) == self.t

    @property
    def patches(self) -> int:
        """Tokens of one token frame."""
        return self.h * self.w

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    @property
    def teacher_frames(self) -> tuple[int, ...]:
        """Per token frame the pixel frame that it is compared with: the last one of its span."""
        return tuple(last - 1 for _, last in self.pixel_spans)

    def __str__(self) -> str:
        return f"{self.t} x {self.h} x {self.w}"


@dataclass(frozen=True)
class Geometry:
    """How a checkpoint turns pixels into latents and latents into tokens.

    Attributes:
        temporal_stride, spatial_stride: of the VAE.
        patch: latent cells of one token along (time, height, width).
        latent_channels: channels of the VAE's latents.
        depth: blocks of the transformer.
        width: D, channels of a token.
        causal: whether the VAE encodes the first pixel frame alone (stride * k + 1 frames).
        tile: rows and columns of tokens come in whole tiles of that side.
    """

    temporal_stride: int
    spatial_stride: int
    patch: tuple[int, int, int]
    latent_channels: int
    depth: int
    width: int
    causal: bool = True
    tile: int = 1

    def __post_init__(self) -> None:
        sizes = (self.temporal_stride, self.spatial_stride, *self.patch, self.latent_channels, self.depth, self.width, self.tile)
        assert all(isinstance(size, int) and size > 0 for size in sizes), f"{sizes}: specs read whole numbers above 0 only"

    @property
    def size_multiple(self) -> tuple[int, int]:
        """Pixels that (height, width) must be a multiple of."""
        token = self.spatial_stride * self.tile
        return token * self.patch[1], token * self.patch[2]

    @property
    def frames_rule(self) -> str:
        """The legal frame counts in words, such as `4k+1`."""
        if not self.causal or self.patch[0] == 1:
            return f"{self.temporal_stride * self.patch[0]}k{'+1' if self.causal else ''}"
        return f"{self.temporal_stride}k+1 with k+1 a multiple of {self.patch[0]}"

    def legal_frames(self, frames: int) -> bool:
        lead = 1 if self.causal else 0
        if frames < 1 or (frames - lead) % self.temporal_stride:
            return False
        latent_frames = (frames - lead) // self.temporal_stride + lead
        return latent_frames % self.patch[0] == 0

    def nearest_frames(self, frames: int) -> tuple[int, ...]:
        """The legal frame counts right below and right above, where they exist."""
        below = next((f for f in range(frames - 1, 0, -1) if self.legal_frames(f)), None)
        above = next(f for f in range(max(frames, 0) + 1, max(frames, 0) + 10_000) if self.legal_frames(f))
        return (above,) if below is None else (below, above)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a clip.

        Args:
            frames, height, width: of the clip in pixels.

        Raises:
            UserError: a size that the model can't take; names the nearest legal ones.
        """
        if not self.legal_frames(frames):
            raise UserError(
                f"num_frames={frames}: this model takes {self.frames_rule} frames",
                "use " + " or ".join(str(legal) for legal in self.nearest_frames(frames)),
                ("num_frames",),
            )
        for name, value, multiple in zip(("height", "width"), (height, width), self.size_multiple, strict=True):
            if value < multiple or value % multiple:
                below = value // multiple * multiple
                legal = [str(size) for size in (below, below + multiple) if size > 0]
                what = f"{name}={value}: this model takes multiples of {multiple}"
                raise UserError(what, "use " + " or ".join(legal), (name,))
        lead = 1 if self.causal else 0
        return (frames - lead) // self.temporal_stride + lead, height // self.spatial_stride, width // self.spatial_stride

    def token_grid(self, frames: int, height: int, width: int) -> TokenGrid:
        """The token grid of a clip, with the span of pixel frames that each token frame encodes.

        Raises:
            UserError: a size that the model can't take.
        """
        latent_frames, rows, columns = self.latent_shape(frames, height, width)
        step = self.temporal_stride

        def first_pixel(latent_frame: int) -> int:
            if not self.causal:
                return latent_frame * step
            return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * step

        patch_t, patch_h, patch_w = self.patch
        spans = tuple((first_pixel(start), first_pixel(start + patch_t)) for start in range(0, latent_frames, patch_t))
        return TokenGrid(latent_frames // patch_t, rows // patch_h, columns // patch_w, spans)
