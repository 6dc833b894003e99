"""The order of the samples, and the randomness of each."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st

from crepatrain.data.buckets import Bucket
from crepatrain.data.cache import CacheStore
from crepatrain.data.loader import MicroBatches, Sample, StepSampler, TrainingSet, keyed_generator
from crepatrain.data.readers import read_batches
from crepatrain.errors import UserError
from crepatrain.geometry import Geometry
from crepatrain.tensors import Batch
from crepatrain.training.diffusion import FlowMatching

GEOMETRY = Geometry(temporal_stride=4, spatial_stride=8, patch=(1, 2, 2), latent_channels=16, depth=2, width=48)
WIDE, TALL = Bucket(9, 64, 96), Bucket(9, 96, 64)
UNIT = 4


def always(_step: int) -> bool:
    return True


def never(_step: int) -> bool:
    return False


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CacheStore:
    """Entries of six samples in two buckets."""
    store = CacheStore(tmp_path_factory.mktemp("loader") / "cache")
    store.write("text", "empty", {"prompt_embeds": torch.zeros(1, 32)})
    for index in range(6):
        _, h, w = GEOMETRY.latent_shape(9, *sides(index))
        store.write("text", f"text{index}", {"prompt_embeds": torch.full((3 + index, 32), float(index + 1))})
        store.write("latents", f"latents{index}", {"latents": torch.randn(16, 3, h, w)})
        store.write("teacher", f"teacher{index}", {"values": torch.randn(3, 24, 48).half()})
        store.write("image", f"image{index}", {"first_frame": torch.full((16, 1, h, w), float(index)), "seen": torch.randn(5, 7)})
    store.write("latents", "picture", {"latents": torch.randn(16, 1, 8, 12)})
    return store


def sides(index: int) -> tuple[int, int]:
    bucket = WIDE if index < 4 else TALL
    return bucket.height, bucket.width


@pytest.fixture
def training_set(store: CacheStore) -> TrainingSet:
    return TrainingSet(
        samples=[
            Sample(f"clip-{i}", WIDE if i < 4 else TALL, f"latents{i}", f"text{i}", teacher=f"teacher{i}") for i in range(6)
        ],
        store=store,
        empty_text="empty",
        caption_dropout=0.3,
        captions_drop_together=False,
        image_dropout=0.0,
        seed=7,
        fps=16.0,
        draw_sigma=dict.fromkeys((WIDE, TALL), FlowMatching("logit_normal").draw_sigma),
        collate_text=tiny_family().collate_text,
        grids={bucket: GEOMETRY.token_grid(bucket.frames, bucket.height, bucket.width) for bucket in (WIDE, TALL)},
        teacher_grids={WIDE: (4, 6), TALL: (6, 4)},
        needs_teacher=always,
    )


def sampler_of(training_set: TrainingSet, unit: int = UNIT) -> StepSampler:
    return StepSampler([sample.bucket for sample in training_set.samples], unit, training_set.seed)


def batches(
    training_set: TrainingSet, *, world: int = 1, rank: int = 0, batch_size: int = UNIT, start: int = 0, workers: int = 0
) -> Iterator[Batch]:
    order = MicroBatches(sampler_of(training_set), start=start, rank=rank, world=world, batch_size=batch_size)
    return read_batches(training_set, order, workers=workers, pin_memory=False)


def conditioned(training_set: TrainingSet, share: float) -> TrainingSet:
    """The same samples, each with its first frame, of which that share is dropped."""
    samples = [replace(sample, image=f"image{index}") for index, sample in enumerate(training_set.samples)]
    return replace(training_set, samples=samples, image_dropout=share)


def one_by_one(batch: Batch) -> list[tuple]:
    """Every sample of a batch as plain numbers, text without the batch's padding."""
    teacher = batch.teacher.values if batch.teacher else [None] * len(batch.keys)
    return [
        (key, sigma.item(), noise.flatten().tolist(), latents.flatten().tolist(), text.flatten()[:4].tolist(), seen is None)
        for key, sigma, noise, latents, text, seen in zip(
            batch.keys, batch.sigma, batch.noise, batch.latents, batch.text["prompt_embeds"], teacher, strict=True
        )
    ]


BUCKETS = st.lists(st.sampled_from([WIDE, TALL, Bucket(1, 64, 64)]), min_size=1, max_size=30)


@given(buckets=BUCKETS, unit=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_an_epoch_shows_every_sample(buckets: list[Bucket], unit: int, seed: int):
    sampler = StepSampler(buckets, unit, seed)
    for epoch in range(2):
        steps = [sampler.samples(epoch * sampler.steps_per_epoch + i) for i in range(sampler.steps_per_epoch)]
        assert all(len(step) == unit for step in steps)
        assert all(len({buckets[index] for index in step}) == 1 for step in steps)
        shown = Counter(itertools.chain.from_iterable(steps))
        assert set(shown) == set(range(len(buckets)))
        assert shown.total() - len(buckets) == sampler.repeats_per_epoch
        for bucket in set(buckets):
            counts = [shown[index] for index, of in enumerate(buckets) if of == bucket]
            assert max(counts) - min(counts) <= 1


def test_the_order_is_a_pure_function_of_seed_and_step():
    buckets = [WIDE] * 7 + [TALL] * 5
    forwards, backwards = StepSampler(buckets, 2, 3), StepSampler(buckets, 2, 3)
    steps = list(range(20))
    there = {step: forwards.samples(step) for step in steps}
    back = {step: backwards.samples(step) for step in reversed(steps)}
    assert there == back
    assert there != {step: StepSampler(buckets, 2, 4).samples(step) for step in steps}
    length = forwards.steps_per_epoch
    assert [there[step] for step in range(length)] != [there[step] for step in range(length, 2 * length)]


WEIGHTS = [0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.7]


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.tuples(st.sampled_from(WEIGHTS), st.sampled_from([WIDE, TALL])), min_size=1, max_size=20),
    unit=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_weights_come_out_exactly_over_whole_turns(weights: list[tuple[float, Bucket]], unit: int, seed: int):
    sampler = StepSampler([bucket for _, bucket in weights], unit, seed, [weight for weight, _ in weights])
    epochs = 10  # in which every one of these weights has whole turns
    seen, least = Counter[int](), Counter[int]()
    for epoch in range(epochs):
        steps = [sampler.samples(step) for step in range(sampler.steps_until(epoch), sampler.steps_until(epoch + 1))]
        assert all(len(step) == unit for step in steps)
        assert all(len({weights[index][1] for index in step}) == 1 for step in steps)
        seen.update(itertools.chain.from_iterable(steps))
        least.update({index: sampler._times(index, epoch) for index in range(len(weights))})
    for index, (weight, _) in enumerate(weights):
        assert least[index] == round(10 * weight)
        assert seen[index] >= least[index], "only what fills a step is shown more often"


def test_two_and_a_half_times_are_five_in_two_epochs():
    sampler = StepSampler([WIDE] * 7, 1, 3, [2.5] * 7)
    lengths = [sampler.steps_until(epoch + 1) - sampler.steps_until(epoch) for epoch in range(4)]
    assert sum(lengths[:2]) == sum(lengths[2:]) == 35
    assert {17, 18} >= set(lengths), "as even as can be"
    for first in (0, 35):
        assert Counter(itertools.chain.from_iterable(sampler.samples(first + i) for i in range(35))) == dict.fromkeys(range(7), 5)
    assert [sampler.place(step)[:2] for step in (0, 34, 35)] == [(0, 0), (1, 34 - lengths[0]), (2, 0)]


def test_weights_of_one_change_no_order():
    buckets = [WIDE] * 7 + [TALL] * 5
    plain, weighted = StepSampler(buckets, 2, 3), StepSampler(buckets, 2, 3, [1.0] * 12)
    assert [plain.samples(step) for step in range(30)] == [weighted.samples(step) for step in range(30)]


def test_any_step_is_found_without_those_before():
    def sampler() -> StepSampler:
        return StepSampler([WIDE] * 5 + [TALL], 2, 3, [0.3] * 5 + [1.7])

    forwards = sampler()
    there = [forwards.samples(step) for step in range(50)]
    assert [sampler().samples(step) for step in reversed(range(50))] == there[::-1]


def test_the_order_does_not_depend_on_global_randomness():
    import random

    buckets = [WIDE] * 9
    first = [StepSampler(buckets, 2, 3).samples(step) for step in range(5)]
    random.seed(99)
    torch.manual_seed(99)
    assert [StepSampler(buckets, 2, 3).samples(step) for step in range(5)] == first


def test_more_samples_a_step_than_there_are():
    sampler = StepSampler([WIDE, WIDE], 5, 0)
    assert sampler.steps_per_epoch == 1
    assert sorted(Counter(sampler.samples(0)).values()) == [2, 3]


def test_keyed_generators_are_their_keys():
    def draw(*key: int | str) -> float:
        return torch.rand((), generator=keyed_generator(*key)).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), (2, 2, 3), ("1", 2, 4)]
    assert len({draw(*key) for key in keys}) == len(keys)


def layouts() -> dict[str, Callable[[TrainingSet, int], list[tuple]]]:
    def whole(training_set: TrainingSet, step: int) -> list[tuple]:
        return one_by_one(next(batches(training_set, start=step)))

    def accumulated(training_set: TrainingSet, step: int) -> list[tuple]:
        source = batches(training_set, start=step, batch_size=2)
        return [sample for _ in range(2) for sample in one_by_one(next(source))]

    def two_processes(training_set: TrainingSet, step: int) -> list[tuple]:
        ranks = [batches(training_set, start=step, world=2, rank=rank, batch_size=2) for rank in range(2)]
        return [sample for source in ranks for sample in one_by_one(next(source))]

    def two_processes_accumulated(training_set: TrainingSet, step: int) -> list[tuple]:
        ranks = [batches(training_set, start=step, world=2, rank=rank, batch_size=1) for rank in range(2)]
        return [sample for _ in range(2) for source in ranks for sample in one_by_one(next(source))]

    return {
        "batch 4": whole,
        "batch 2, accumulation 2": accumulated,
        "2 processes, batch 2": two_processes,
        "2 processes, batch 1, accumulation 2": two_processes_accumulated,
    }


def test_draws_are_the_same_in_every_layout(training_set: TrainingSet):
    for step in (0, 1, 5):
        results = {name: layout(training_set, step) for name, layout in layouts().items()}
        assert all(result == results["batch 4"] for result in results.values())


def test_draws_differ_between_steps_slots_and_seeds(training_set: TrainingSet):
    source = batches(training_set)
    sigmas = [sigma for _ in range(6) for sigma in next(source).sigma.tolist()]
    assert len(set(sigmas)) == len(sigmas)
    other = next(batches(replace(training_set, seed=8)))
    assert not set(other.sigma.tolist()) & set(sigmas)
    first, second = next(batches(training_set, start=0)), next(batches(training_set, start=1))
    assert not torch.equal(first.noise.flatten()[:64], second.noise.flatten()[:64])


def test_a_stream_opened_later_goes_on_as_the_first(training_set: TrainingSet):
    source = batches(training_set)
    for _ in range(3):
        next(source)
    assert one_by_one(next(source)) == one_by_one(next(batches(training_set, start=3)))


def test_a_batch_is_of_one_bucket_and_its_grid(training_set: TrainingSet):
    source = batches(training_set)
    seen = set()
    for _ in range(sampler_of(training_set).steps_per_epoch):
        batch = next(source)
        assert batch.teacher is not None
        tall = batch.latents.shape[3:] == (12, 8)
        seen.add(tall)
        assert (batch.grid.t, batch.grid.h, batch.grid.w) == ((3, 6, 4) if tall else (3, 4, 6))
        assert batch.teacher.grid == ((6, 4) if tall else (4, 6))
        assert batch.noise.shape == batch.latents.shape
        assert ((batch.sigma > 0) & (batch.sigma < 1)).all()
    assert seen == {True, False}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_caption_dropout(training_set: TrainingSet, share: float, expected: float):
    source = batches(replace(training_set, caption_dropout=share))
    dropped = [(text == 0).all().item() for _ in range(100) for text in next(source).text["prompt_embeds"]]
    assert sum(dropped) / len(dropped) == pytest.approx(expected, abs=0.08 if 0 < share < 1 else 0)


def test_dropout_leaves_the_other_draws_alone(training_set: TrainingSet):
    dropped, kept = (next(batches(replace(training_set, caption_dropout=share))) for share in (1.0, 0.0))
    assert torch.equal(dropped.sigma, kept.sigma)
    assert torch.equal(dropped.noise, kept.noise)


def literal_draw(training_set: TrainingSet, step: int, slot: int) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """Sigma, whether the caption is dropped, and noise, in the order in which they were drawn before there was more to draw."""
    generator = keyed_generator(training_set.seed, step, slot)
    sigma = training_set.draw_sigma[WIDE](generator)
    dropped = torch.rand((), generator=generator).item() < training_set.caption_dropout
    sample = training_set.samples[sampler_of(training_set).samples(step)[slot]]
    shape = training_set.store.read("latents", sample.latents)["latents"].shape
    return sigma, dropped, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_first_frames_leave_the_other_draws_as_they_were(training_set: TrainingSet, share: float | None):
    source = batches(training_set if share is None else conditioned(training_set, share))
    for step in range(4):
        batch = next(source)
        assert (batch.conditioning == {}) == (share is None)
        for slot in range(UNIT):
            sigma, dropped, noise = literal_draw(training_set, step, slot)
            assert torch.equal(batch.sigma[slot], sigma)
            assert torch.equal(batch.noise[slot], noise)
            assert (batch.text["prompt_embeds"][slot] == 0).all() == dropped


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_first_frames_are_dropped_at_their_rate(training_set: TrainingSet, share: float):
    source = batches(conditioned(training_set, share))
    kept = torch.cat([next(source).conditioning["given"] for _ in range(100)])
    assert kept.dtype == torch.float32
    assert set(kept.tolist()) <= {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(1 - share, abs=0.08 if 0 < share < 1 else 0)


def test_a_conditioning_is_its_samples_own(training_set: TrainingSet):
    source = batches(conditioned(training_set, 0.5))
    for _ in range(3):
        batch = next(source)
        assert batch.conditioning.keys() == {"first_frame", "seen", "given"}
        assert batch.conditioning["first_frame"].shape == (UNIT, 16, 1, *batch.latents.shape[3:])
        assert batch.conditioning["given"].shape == (UNIT,)
        for name, first, seen in zip(batch.keys, batch.conditioning["first_frame"], batch.conditioning["seen"], strict=True):
            index = int(name.removeprefix("clip-"))
            assert (first == index).all()
            assert torch.equal(seen, training_set.store.read("image", f"image{index}")["seen"])


def test_dropped_first_frames_are_the_same_in_every_layout(training_set: TrainingSet):
    """One process or two, one micro-batch or two, from the beginning or from a later step, alone or with workers."""
    subject = conditioned(training_set, 0.5)

    def shown(source: Iterator[Batch], times: int) -> list[float]:
        return [value for _ in range(times) for value in next(source).conditioning["given"].tolist()]

    expected = shown(batches(subject), 8)
    assert shown(batches(subject), 8) == expected
    assert shown(batches(subject, start=3), 5) == expected[3 * UNIT :]
    assert shown(batches(subject, batch_size=1), 8 * UNIT) == expected
    assert shown(batches(subject, batch_size=2, workers=2), 16) == expected
    ranks = [shown(batches(subject, world=2, rank=rank, batch_size=1), 8 * 2) for rank in range(2)]
    assert [value for pair in zip(*ranks, strict=True) for value in pair] == expected
    assert shown(batches(replace(subject, seed=8)), 8) != expected


def test_images_have_no_conditioning_and_never_share_a_batch_with_clips(training_set: TrainingSet):
    picture = Bucket(1, 64, 96)
    subject = conditioned(training_set, 0.0)
    pictures = [Sample(f"picture-{i}", picture, "picture", f"text{i}") for i in range(3)]
    subject = replace(
        subject,
        samples=[*subject.samples, *pictures],
        grids={**subject.grids, picture: GEOMETRY.token_grid(1, 64, 96)},
        draw_sigma={**subject.draw_sigma, picture: subject.draw_sigma[WIDE]},
        teacher_grids={**subject.teacher_grids, picture: (4, 6)},
        needs_teacher=never,
    )
    source = batches(subject)
    seen = set()
    for _ in range(2 * sampler_of(subject).steps_per_epoch):
        batch = next(source)
        alone = {key.startswith("picture-") for key in batch.keys}
        assert len(alone) == 1
        seen |= alone
        assert (batch.grid.t == 1) == (batch.latents.shape[2] == 1) == alone.pop()
        assert ("given" in batch.conditioning) == (batch.grid.t > 1)
    assert seen == {True, False}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_captions_that_drop_together_drop_for_a_whole_step(training_set: TrainingSet, share: float, expected: float):
    subject = replace(training_set, captions_drop_together=True, caption_dropout=share, needs_teacher=never)
    source, halves = batches(subject), batches(subject, batch_size=2)
    ranks = [batches(subject, world=2, rank=rank, batch_size=1) for rank in range(2)]
    steps = []
    for _ in range(150):
        dropped = [bool((text == 0).all()) for text in next(source).text["prompt_embeds"]]
        assert len(set(dropped)) == 1
        steps.append(dropped[0])
        parts = [next(halves), next(halves), *(next(rank) for rank in ranks for _ in range(2))]
        assert {bool((text == 0).all()) for part in parts for text in part.text["prompt_embeds"]} == {dropped[0]}
    assert sum(steps) / len(steps) == pytest.approx(expected, abs=0.11 if 0 < share < 1 else 0)


def test_captions_drop_together_by_a_draw_of_their_own(training_set: TrainingSet):
    """Not by one that a sample's noise level or another seed's captions hang on."""
    together = replace(training_set, captions_drop_together=True, caption_dropout=0.5, needs_teacher=never)

    def steps(subject: TrainingSet) -> list[tuple[bool, float]]:
        source = batches(subject)
        found = [next(source) for _ in range(60)]
        return [(bool((batch.text["prompt_embeds"][0] == 0).all()), batch.sigma.mean().item()) for batch in found]

    first = steps(together)
    assert first == steps(together)
    assert [dropped for dropped, _ in first] != [dropped for dropped, _ in steps(replace(together, seed=8))]
    assert [sigma for _, sigma in first] == [sigma for _, sigma in steps(replace(together, caption_dropout=0.0))]
    means = [
        sum(sigma for dropped, sigma in first if dropped == on) / sum(dropped == on for dropped, _ in first) for on in (0, 1)
    ]
    assert means[0] == pytest.approx(means[1], abs=0.1)


def test_captions_of_one_length_are_alone_in_their_batch(training_set: TrainingSet):
    lengths = {0: 5, 1: 5, 2: 9, 3: 9, 4: 5, 5: 5}
    samples = [
        replace(sample, bucket=replace(sample.bucket, caption_tokens=lengths[index]))
        for index, sample in enumerate(training_set.samples)
    ]
    grids = {sample.bucket: GEOMETRY.token_grid(9, sample.bucket.height, sample.bucket.width) for sample in samples}
    draws = dict.fromkeys(grids, training_set.draw_sigma[WIDE])
    subject = replace(training_set, samples=samples, grids=grids, draw_sigma=draws, needs_teacher=never)
    source, seen = batches(subject), set()
    for _ in range(2 * sampler_of(subject).steps_per_epoch):
        found = {lengths[int(key.removeprefix("clip-"))] for key in next(source).keys}
        assert len(found) == 1
        seen |= found
    assert seen == {5, 9}


def test_workers_change_nothing(training_set: TrainingSet):
    alone, helped = batches(training_set, batch_size=2), batches(training_set, batch_size=2, workers=2)
    for _ in range(8):
        assert one_by_one(next(alone)) == one_by_one(next(helped))


def test_the_loader_leaves_global_randomness_alone(training_set: TrainingSet):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(batches(training_set))
    next(batches(training_set, workers=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def without_features(training_set: TrainingSet, tmp_path: Path) -> TrainingSet:
    root = tmp_path / "cache"
    shutil.copytree(training_set.store.root, root)
    shutil.rmtree(root / "teacher")
    return replace(training_set, store=CacheStore(root))


def test_features_are_not_read_where_none_are_needed(without_features: TrainingSet):
    batch = next(batches(replace(without_features, needs_teacher=never)))
    assert batch.teacher is None
    source = batches(replace(without_features, needs_teacher=lambda step: step >= 2))
    assert next(source).teacher is None
    assert next(source).teacher is None
    with pytest.raises(UserError, match=r"cache entry"):
        next(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_entry_is_reported_by_name(without_features: TrainingSet, workers: int):
    """From a worker process too: the message must arrive as what it is."""
    with pytest.raises(UserError) as error:
        next(batches(without_features, workers=workers))
    assert "teacher" in str(error.value)
    assert ".safetensors" in str(error.value)
    assert error.value.problems[0].fix
