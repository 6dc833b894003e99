"""Several datasets, parts of files and lengths of windows on their way into caches and batches."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from common import Listening, context_of, render_clip

from crepatrain.config.plan import Plan, read_plan
from crepatrain.errors import UserError
from crepatrain.preparing.precompute import plan_caches
from crepatrain.preparing.preflight import Dataset, build_sampler, dataset_facts, listed_clips, read_dataset, samples_digest


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Folders a (a wide and a tall clip of 20 frames) and b (one of 30)."""
    root = tmp_path_factory.mktemp("sources")
    for folder, name, shape in (("a", "wide", (96, 160)), ("a", "tall", (160, 96)), ("b", "long", (96, 160))):
        (root / folder).mkdir(exist_ok=True)
        render_clip(root / folder / f"{name}.mp4", frames=30 if name == "long" else 20, height=shape[0], width=shape[1])
        (root / folder / f"{name}.txt").write_text(f"the {name} one", encoding="utf-8")
    return root


@pytest.fixture
def look(config_file) -> Callable[..., tuple[Plan, Dataset, list[str]]]:
    def command(**changes: Any) -> tuple[Plan, Dataset, list[str]]:
        plan, screen = read_plan(config_file(**{"height": 64, "width": 96, "num_frames": 9, "fps": 16, **changes})), Listening()
        return plan, read_dataset(context_of(plan, screen)), screen.notes

    return command


def test_each_dataset_is_cut_by_its_own_settings(look, sources):
    entries = [
        {"path": str(sources / "a"), "repeats": 2.5, "caption_prefix": "new, ", "clip_mode": "first"},
        {"path": str(sources / "b"), "num_frames": 5, "height": 96, "fps": 8, "start": 0.5, "end": 1.5, "caption_suffix": "!"},
    ]
    plan, dataset, _ = look(train_data=entries, caption_prefix="run, ", clip_mode="middle")
    found = [(w.path.stem, w.frames, (w.bucket.height, w.bucket.width), w.clip.rule.weight) for w in dataset.clips.windows]
    assert found == [
        ("tall", tuple(range(9)), (64, 96), 2.5),
        ("wide", tuple(range(9)), (64, 96), 2.5),
        ("long", (12, 14, 16, 18, 20), (96, 96), 1.0),
    ]
    assert [w.clip.caption for w in dataset.clips.windows] == ["new, the tall one", "new, the wide one", "run, the long one!"]
    sampler = build_sampler(plan, dataset, world=1)
    seen = Counter(sample for step in range(sampler.steps_until(2)) for sample in sampler.samples(step))
    assert seen == {0: 5, 1: 5, 2: 2}
    assert dataset_facts(plan, dataset, sampler)["train_data"] == f"{sources / 'a'}, {sources / 'b'}"


def test_one_folder_in_a_list_is_that_folder(look, sources):
    """To the digest by which a run that began with one goes on with the other, and to the keys of the cache."""
    plan, folder, _ = look(train_data=str(sources / "a"))
    _, entry, _ = look(train_data=[{"path": str(sources / "a")}])
    assert samples_digest(folder) == samples_digest(entry)
    assert listed_clips(plan, folder) == listed_clips(plan, entry)
    context = context_of(plan)
    assert plan_caches(context, folder, teacher=True).samples == plan_caches(context, entry, teacher=True).samples


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"repeats": 2}, set()),
        ({"caption_prefix": "x "}, {"text"}),
        ({"num_frames": 5}, {"latents", "teacher"}),
        ({"height": 96}, {"latents", "teacher"}),
        ({"fps": 8}, {"latents", "teacher"}),
        ({"start": 0.25}, {"latents", "teacher"}),
        ({"end": 0.75}, {"latents", "teacher"}),
        ({"clip_mode": "middle"}, {"latents", "teacher"}),
    ],
)
def test_what_changes_a_sample_changes_its_entries_and_the_dataset(look, sources, changes, again):
    plan, before, _ = look(train_data=[{"path": str(sources / "b")}])
    _, now, _ = look(train_data=[{"path": str(sources / "b")} | changes])
    context = context_of(plan)
    first, second = (plan_caches(context, dataset, teacher=True) for dataset in (before, now))
    for kind in ("latents", "text", "teacher"):
        keys = [{getattr(sample, kind) for sample in caches.samples} for caches in (first, second)]
        assert (keys[0] != keys[1]) == (kind in again), kind
    assert samples_digest(before) != samples_digest(now)
    assert listed_clips(plan, before) != listed_clips(plan, now)


def test_crops_are_in_the_keys(look, sources):
    keys = {}
    for crop in ("center", "random", "none"):
        plan, dataset, notes = look(train_data=str(sources / "a"), crop=crop)
        keys[crop] = {sample.latents for sample in plan_caches(context_of(plan), dataset, teacher=False).samples}
        assert any("squeezed" in note for note in notes) == (crop == "none")
    assert not keys["center"] & keys["random"]
    assert not keys["center"] & keys["none"]


def test_parts_of_one_file_are_clips_of_their_own(look, sources, tmp_path):
    rows = [
        {"video": str(sources / "b" / "long.mp4"), "caption": f"part {n}", "start": n * 0.6, "end": n * 0.6 + 0.6}
        for n in range(3)
    ]
    rows[2]["repeats"] = 3
    (tmp_path / "parts.json").write_text(json.dumps(rows), encoding="utf-8")
    plan, dataset, _ = look(train_data=str(tmp_path / "parts.json"))
    assert [(w.frames[0], w.clip.caption, w.clip.rule.weight) for w in dataset.clips.windows] == [
        (0, "part 0", 1),
        (10, "part 1", 1),
        (20, "part 2", 3),
    ]
    names = [clip["file"] for clip in listed_clips(plan, dataset)]
    assert len(set(names)) == 3
    assert names[0].endswith("long.mp4 from 0 s to 0.6 s")


def test_problems_of_all_datasets_come_at_once(look, sources, tmp_path):
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        render_clip(tmp_path / name / "clip.mp4", frames=9)
    entries = [{"path": str(sources / "a")}, {"path": str(tmp_path / "c")}, {"path": str(tmp_path / "d")}]
    with pytest.raises(UserError) as raised:
        look(train_data=entries)
    assert [problem.what for problem in raised.value.problems] == [
        f"dataset {number} ({tmp_path / name}): clip.mp4: no caption" for number, name in ((2, "c"), (3, "d"))
    ]


def test_lengths_and_sizes_of_a_list_are_buckets(look, sources):
    plan, dataset, _ = look(train_data=str(sources), frame_buckets=[5, 9], aspect_buckets=[[64, 96], [96, 64]])
    assert {str(bucket) for bucket in dataset.clips.buckets} == {"9 x 64 x 96", "9 x 96 x 64"}
    _, auto, _ = look(train_data=str(sources), frame_buckets="auto", num_frames=25)
    assert sorted(str(bucket) for bucket in auto.clips.buckets) == ["17 x 64 x 96", "25 x 64 x 96"]
    sampler = build_sampler(plan, dataset, world=1)
    assert sum(len(sampler.samples(step)) for step in range(sampler.steps_per_epoch)) == len(dataset.clips.windows)


def test_a_family_that_sees_the_rate_has_a_bucket_for_each(config_file, tiny_checkpoint, sources):
    folder = tiny_checkpoint("ltxvideo", "tiny")
    models = {"pretrained_model_name_or_path": str(folder), "crepa_encoder": str(folder / "encoder")}
    entries = [{"path": str(sources / "a")}, {"path": str(sources / "b"), "fps": 8}]
    plan = read_plan(
        config_file(model_family="ltxvideo", train_data=entries, fps=16, height=64, width=96, num_frames=9, **models)
    )
    dataset = read_dataset(context_of(plan))
    assert sorted(str(bucket) for bucket in dataset.clips.buckets) == ["9 x 64 x 96", "9 x 64 x 96, 8 fps"]
    config = plan.config.changed(fps="keep", train_data=str(sources / "a"))
    kept = read_dataset(context_of(replace(plan, config=config, datasets=plan.datasets[:1])))
    assert {bucket.fps for bucket in kept.clips.buckets} == {16.0}
