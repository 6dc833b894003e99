"""Batches in an order that is a pure function of (seed, step), with the random draws of every sample."""

import bisect
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crepatrain.data.buckets import Bucket, Window
from crepatrain.data.cache import CacheStore, unpack_features
from crepatrain.data.clip import Unreadable
from crepatrain.data.decode import FrameReader
from crepatrain.errors import Problem, UserError
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch, PatchFeatures


@dataclass(frozen=True)
class Sample:
    """One window as training sees it: where its tensors are in the cache.

    Attributes:
        image: key of what its first frame adds, where it is conditioned on it.
        teacher: key of the teacher's features; None where they are not cached.
        pixels: the window's frames that a teacher encodes in the step; None where it doesn't.
    """

    name: str
    bucket: Bucket
    latents: str
    text: str
    image: str | None = None
    teacher: str | None = None
    pixels: Window | None = None


@dataclass(frozen=True)
class Draw:
    """A sample at its place in training: optimizer step, and slot among all samples of that step."""

    sample: int
    step: int
    slot: int


class StepSampler:
    """Which samples make up an optimizer step, for every step from 0 on.

    An epoch shuffles each bucket, repeats some of its samples to fill the last step, and shuffles the steps: all samples of a
    step, over micro-batches and processes, are of one bucket.

    A sample of weight 2.5 is in two or three times, in turn. Which samples have their turn in which epoch is drawn by the seed,
    such that a whole number of turns comes out exactly: five times in two epochs.

    Args:
        buckets: of every sample.
        unit: samples of one optimizer step, over all micro-batches and processes.
        seed: of the order.
        weights: of every sample; None: all 1.
    """

    def __init__(self, buckets: Sequence[Bucket], unit: int, seed: int, weights: Sequence[float] | None = None) -> None:
        assert buckets
        self._buckets = tuple(buckets)
        self._weights = tuple(weights or [1.0] * len(buckets))
        self._by_bucket: dict[Bucket, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self._by_bucket.setdefault(bucket, []).append(index)
        self.unit = unit
        self.seed = seed
        self._turns = self._draw_turns()
        self._even = all(weight == int(weight) for weight in self._weights)
        self._ends = [0]  # the first step behind each epoch
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; where weights are no whole numbers, others may have a few more or less."""
        return self.steps_until(1)

    @property
    def repeats_per_epoch(self) -> int:
        """Samples that the first epoch shows once more so that its steps are full."""
        return self.steps_per_epoch * self.unit - sum(len(indices) for indices in self._samples_of(0).values())

    def steps_until(self, epoch: int) -> int:
        """Optimizer steps of all epochs before this one."""
        while len(self._ends) <= epoch:
            number = len(self._ends) - 1
            counts = [len(indices) for indices in self._samples_of(0 if self._even else number).values()]
            self._ends.append(self._ends[-1] + sum(-(-count // self.unit) for count in counts))
        return self._ends[epoch]

    def place(self, step: int) -> tuple[int, int, int]:
        """The epoch of an optimizer step, which step of it that is, both from 0, and how many it has."""
        epoch = self._epoch_of(step)
        first = self.steps_until(epoch)
        return epoch, step - first, self.steps_until(epoch + 1) - first

    def samples(self, step: int) -> list[int]:
        """The samples of an optimizer step, in the order of their slots."""
        epoch, position, _ = self.place(step)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._shuffle(epoch))
        return self._plan[1][position]

    def bucket(self, step: int) -> Bucket:
        """Of all samples of an optimizer step."""
        return self._buckets[self.samples(step)[0]]

    def _epoch_of(self, step: int) -> int:
        if self._even:
            return step // self.steps_per_epoch
        while self._ends[-1] <= step:
            self.steps_until(len(self._ends))
        return bisect.bisect_right(self._ends, step) - 1

    def _draw_turns(self) -> Sequence[float]:
        """When each sample's fraction has its turn, from 0 to 1, evenly over the samples of one weight."""
        turns = [0.0] * len(self._weights)
        for weight in sorted(set(self._weights)):
            alike = [index for index, other in enumerate(self._weights) if other == weight]
            random.Random(f"{self.seed}/turns/{weight}").shuffle(alike)
            for place, index in enumerate(alike):
                turns[index] = (place + 0.5) / len(alike)
        return turns

    def _samples_of(self, epoch: int) -> dict[Bucket, list[int]]:
        """Every sample as often as it is in an epoch."""
        return {
            bucket: [index for index in indices for _ in range(self._times(index, epoch))]
            for bucket, indices in self._by_bucket.items()
        }

    def _times(self, index: int, epoch: int) -> int:
        if self._weights[index] == int(self._weights[index]):
            return int(self._weights[index])
        # Exact: with binary fractions 0.1 of 10 epochs would be 0 or 1 times, as the rounding falls.
        weight, turn = Fraction(str(self._weights[index])), Fraction(self._turns[index])
        return math.floor(weight * (epoch + 1) + turn) - math.floor(weight * epoch + turn)

    def _shuffle(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self.seed}/{epoch}")
        steps = []
        found = self._samples_of(epoch)
        for bucket in sorted(found, key=str):
            indices = found[bucket]
            order.shuffle(indices)
            short = -len(indices) % self.unit
            indices += [indices[i % len(indices)] for i in range(short)]
            steps += [indices[start : start + self.unit] for start in range(0, len(indices), self.unit)]
        order.shuffle(steps)
        return steps


class MicroBatches:
    """The draws of one process, micro-batch by micro-batch, without end.

    Slots are numbered over a step's micro-batches, then processes, then samples, so a sample's draw does not depend on how many
    processes or micro-batches the step is split into.

    Args:
        start: the optimizer step to begin with.
        rank, world: of the process.
        batch_size: samples of one micro-batch on one process.
    """

    def __init__(self, sampler: StepSampler, *, start: int, rank: int, world: int, batch_size: int) -> None:
        assert sampler.unit % (world * batch_size) == 0
        self._sampler = sampler
        self._start = start
        self._first = rank * batch_size
        self._stride = world * batch_size
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self._start
        while True:
            samples = self._sampler.samples(step)
            for base in range(self._first, self._sampler.unit, self._stride):
                yield [Draw(samples[slot], step, slot) for slot in range(base, base + self._batch_size)]
            step += 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for a key, such as (seed, step, slot)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(eq=False)
class TrainingSet(Dataset[Any]):
    """Reads samples from the cache and draws their randomness.

    Attributes:
        empty_text: key of the empty caption.
        caption_dropout: share of samples trained with it.
        fps: of the run; a bucket may have its own.
        captions_drop_together: all of an optimizer step or none, for a model that takes captions of one length alone.
        image_dropout: share of samples trained without their first frame, of those that are conditioned on it.
        draw_sigma: of every bucket: a sample's noise level, from its generator.
        collate_text: pads texts into a batch.
        grids: token grid of every bucket.
        teacher_grids: (rows, columns) of the cached teacher features of every bucket.
        needs_teacher: whether an optimizer step will ask the teacher; nothing is read for it otherwise.
    """

    samples: Sequence[Sample]
    store: CacheStore
    empty_text: str
    caption_dropout: float
    captions_drop_together: bool
    image_dropout: float
    seed: int
    fps: float
    draw_sigma: Mapping[Bucket, Callable[[torch.Generator], Tensor]]
    collate_text: Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]
    grids: Mapping[Bucket, TokenGrid]
    teacher_grids: Mapping[Bucket, tuple[int, int]]
    needs_teacher: Callable[[int], bool]

    def __post_init__(self) -> None:
        self._frames = FrameReader()

    def __getitems__(self, draws: Sequence[Draw]) -> "Batch | list[Problem]":
        """The batch of one micro-batch's draws, or what the user has to fix: an exception can't leave a worker process."""
        try:
            return self.read(draws)
        except UserError as error:
            return error.problems

    def read(self, draws: Sequence[Draw]) -> Batch:
        """The batch of one micro-batch's draws.

        Raises:
            UserError: something of it can't be read.
        """
        bucket = self.samples[draws[0].sample].bucket
        assert all(self.samples[draw.sample].bucket == bucket for draw in draws)
        latents, noise, sigma, texts, images, teacher, pixels = [], [], [], [], [], [], []
        for draw in draws:
            sample = self.samples[draw.sample]
            generator = keyed_generator(self.seed, draw.step, draw.slot)
            sigma.append(self.draw_sigma[bucket](generator))
            chance = keyed_generator("captions", self.seed, draw.step) if self.captions_drop_together else generator
            dropped = torch.rand((), generator=chance).item() < self.caption_dropout
            latents.append(self.store.read("latents", sample.latents)["latents"])
            noise.append(torch.randn(latents[-1].shape, generator=generator))
            texts.append(self.store.read("text", self.empty_text if dropped else sample.text))
            if sample.image is not None:
                given = torch.rand((), generator=generator) >= self.image_dropout
                images.append({**self.store.read("image", sample.image), "given": given.float()})
            if sample.teacher is not None and self.needs_teacher(draw.step):
                teacher.append(unpack_features(self.store.read("teacher", sample.teacher)))
            if sample.pixels is not None and self.needs_teacher(draw.step):
                pixels.append(self._read_pixels(sample))
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noise),
            sigma=torch.stack(sigma),
            text=self.collate_text(texts),
            grid=self.grids[bucket],
            fps=self.fps if bucket.fps is None else bucket.fps,
            keys=tuple(self.samples[draw.sample].name for draw in draws),
            conditioning={name: torch.stack([image[name] for image in images]) for name in (images[0] if images else ())},
            teacher=PatchFeatures(torch.stack(teacher), self.teacher_grids[bucket]) if teacher else None,
            pixels=torch.stack(pixels) if pixels else None,
        )

    def _read_pixels(self, sample: Sample) -> Tensor:
        assert sample.pixels is not None
        window, bucket = sample.pixels, sample.bucket
        try:
            return self._frames.read(window.clip, window.frames, (bucket.height, bucket.width), window.crop)
        except (Unreadable, OSError) as error:
            raise UserError(f"{window.path}: {error}", "put the clip back as it was when the run began") from error
