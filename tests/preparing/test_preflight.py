"""What is found out of a dataset before anything is computed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Listening, context_of, render_clip, render_image, tiny_family, tiny_variants

from crepatrain.commands.fit import fit
from crepatrain.config.plan import Plan, read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.preparing.decisions import decisions, dropped_in_words
from crepatrain.preparing.precompute import plan_caches
from crepatrain.preparing.preflight import (
    Dataset,
    build_sampler,
    dataset_facts,
    image_bytes,
    latents_bytes,
    read_dataset,
    read_datasets,
    samples_digest,
)
from crepatrain.specs import FAMILIES
from crepatrain.training import build


@pytest.fixture
def look(config_file, clips_and_images, tiny_checkpoint) -> Callable[..., tuple[Plan, Dataset, list[str]]]:
    """Looks at the clips and images with a tiny checkpoint: the plan, what was found, and what was reported."""

    def command(family: str = "wan", size: str = "tiny", **changes: Any) -> tuple[Plan, Dataset, list[str]]:
        of = {"model_family": family, "pretrained_model_name_or_path": str(tiny_checkpoint(family, size))}
        plan, screen = read_plan(config_file(**{"train_data": str(clips_and_images), **of, **changes})), Listening()
        return plan, read_dataset(context_of(plan, screen)), screen.notes

    return command


@pytest.fixture
def images(tmp_path) -> Path:
    """Three captioned images alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        render_image(folder / f"{index}.png", seed=index)
        (folder / f"{index}.txt").write_text(f"blocks {index}", encoding="utf-8")
    return folder


# Images


@pytest.mark.parametrize(("family", "size"), [(family, size) for family, size, variant in tiny_variants() if variant.images])
def test_images_are_buckets_of_one_frame_beside_the_clips(look, family, size):
    plan, dataset, _ = look(family, size, fps=16)
    counts = {bucket.frames: count for bucket, count in dataset.clips.buckets.items()}
    assert counts == {9: 6, 1: 2}
    assert {bucket.frames: grid.t for bucket, grid in dataset.grids.items()} == {9: plan.grid.t, 1: 1}
    assert not dataset.refused
    sampler = build_sampler(plan, dataset, world=3)
    for step in range(2 * sampler.steps_per_epoch):
        assert len({dataset.clips.windows[sample].bucket for sample in sampler.samples(step)}) == 1


@pytest.mark.parametrize(("size", "title"), [("tiny-i2v", "Wan 2.1 image-to-video"), ("tiny-i2v-a14b", "Wan 2.2 image-to-video")])
def test_images_are_refused_where_the_channels_have_no_place_for_them(look, size, title):
    expert = {"wan_expert": "high"} if "a14b" in size else {}
    with pytest.raises(UserError) as caught:
        look(size=size, **expert)
    problems = caught.value.problems
    assert [Path(problem.what.partition(": ")[0]).name for problem in problems] == ["image-0.png", "image-1.jpg"]
    for problem in problems:
        assert problem.what.endswith(f"it is an image, and {title} is trained on clips only")
        assert "remove it" in problem.fix
        assert "unusable_clips" in problem.fix
    _, dataset, notes = look(size=size, unusable_clips="skip", **expert)
    assert {window.bucket.frames for window in dataset.clips.windows} == {9}
    assert sum("image-0.png is left out: it is an image" in note for note in notes) == 1
    assert len(dataset.refused) == 2


def test_a_dataset_of_images_alone_can_be_trained_on(look, images):
    _, dataset, _ = look(train_data=str(images))
    assert {bucket.frames: count for bucket, count in dataset.clips.buckets.items()} == {1: 3}


def test_a_dataset_of_images_alone_is_none_for_image_to_video_channels(look, images):
    with pytest.raises(UserError, match="no clip of it can be used"):
        look(size="tiny-i2v", train_data=str(images), unusable_clips="skip")


def test_a_broken_image_is_refused_in_one_message(look, images):
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        look(train_data=str(images))
    (problem,) = caught.value.problems
    assert problem.what == f"{images / '1.png'}: it is no image, or is cut off"
    _, dataset, notes = look(train_data=str(images), unusable_clips="skip")
    assert len(dataset.clips.windows) == 2
    assert len(notes) == 1


def test_an_image_without_a_caption_is_reported_as_a_clip_is(look, images):
    (images / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.png: no caption"):
        look(train_data=str(images))
    _, dataset, _ = look(train_data=str(images), missing_captions="filename")
    assert "1" in {window.clip.caption for window in dataset.clips.windows}


def test_first_frames_take_disk_of_their_own(look):
    plan, dataset, _ = look("ltxvideo", task="i2v")
    by_frames = {bucket.frames: bucket for bucket in dataset.grids}
    assert image_bytes(plan, by_frames[1]) == 0
    assert 0 < image_bytes(plan, by_frames[9]) <= latents_bytes(plan, by_frames[9])
    plan, dataset, _ = look("ltxvideo")
    assert {image_bytes(plan, bucket) for bucket in dataset.grids} == {0}


# The threshold: 9 frames are 3 token frames, whose score reaches 1.491


def test_a_threshold_that_images_can_not_reach_is_refused(look, images):
    with pytest.raises(UserError) as caught:
        look(train_data=str(images), crepa_similarity_threshold=1.2)
    (problem,) = caught.value.problems
    assert problem.what.startswith("crepa_similarity_threshold=1.2: ")
    assert "images can't exceed 1" in problem.what
    assert problem.fix == "use 1 or less"
    _, _, notes = look(train_data=str(images), crepa_similarity_threshold=1.0)
    assert notes == []
    look(train_data=str(images), crepa_similarity_threshold=1.2, crepa_enabled=False)


def test_a_threshold_over_images_and_clips_is_reported_to_depend_on_their_mix(look):
    _, _, notes = look(crepa_similarity_threshold=1.2)
    (note,) = notes
    assert "images score at most 1" in note
    assert "crepa_threshold_metric to self" in note
    assert len(look(crepa_similarity_threshold=0.8)[2]) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crepa_similarity_threshold": 0.9, "crepa_threshold_metric": "self"},
        {"crepa_similarity_threshold": 0.9, "crepa_enabled": False},
        {"crepa_similarity_threshold": 0.9, "crepa_adjacent_distance": 0},
        {"crepa_similarity_threshold": 0.9, "crepa_normalize_neighbour_sum": True},
    ],
    ids=lambda changes: ",".join(changes) or "no threshold",
)
def test_where_images_score_as_clips_do_nothing_is_reported(look, changes):
    assert look(**changes)[2] == []


def test_a_threshold_over_clips_alone_is_no_matter(look, clips):
    assert look(train_data=str(clips), crepa_similarity_threshold=1.2)[2] == []


# Captions of one length in a batch

CAPTIONS = ("a", "bb", "a square moves", "a square moves, and it is told at length" * 20)


@pytest.fixture
def spoken(clips, tmp_path) -> Path:
    """The clips, with captions of other lengths, and an image with one of the same length as a clip's."""
    folder = Path(shutil.copytree(clips, tmp_path / "spoken"))
    render_image(folder / "image.png")
    for name, caption in {"clip-0": CAPTIONS[0], "clip-1": CAPTIONS[1], "clip-2": CAPTIONS[3], "image": "cc"}.items():
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def test_batches_of_kandinsky_hold_captions_of_one_length(look, spoken, tiny_checkpoint):
    plan, dataset, _ = look("kandinsky5_video", train_data=str(spoken), train_batch_size=2, fps=16)
    family, folder = tiny_family("kandinsky5_video"), str(tiny_checkpoint("kandinsky5_video"))
    encoder = family.load_text_encoder(folder, torch.float32)
    found: dict[str, set[int | None]] = {}
    for window in dataset.clips.windows:
        found.setdefault(window.clip.caption, set()).add(window.bucket.caption_tokens)
    assert len(found) == 4
    with torch.no_grad():
        encoded = family.encode_text(encoder, list(found))
    lengths = {caption: text["prompt_embeds"].shape[0] for caption, text in zip(found, encoded, strict=True)}
    assert found == {caption: {length} for caption, length in lengths.items()}
    assert lengths[CAPTIONS[3]] == 512
    assert lengths[CAPTIONS[0]] < lengths[CAPTIONS[1]] == lengths["cc"]
    assert {(bucket.frames, bucket.caption_tokens) for bucket in dataset.grids} == {
        (9, lengths[CAPTIONS[0]]),
        (9, lengths[CAPTIONS[1]]),
        (9, lengths[CAPTIONS[3]]),
        (1, lengths["cc"]),
    }
    sampler = build_sampler(plan, dataset, world=1)
    for step in range(2 * sampler.steps_per_epoch):
        assert len({lengths[dataset.clips.windows[sample].clip.caption] for sample in sampler.samples(step)}) == 1


def test_captions_are_not_counted_where_it_does_not_matter(look, spoken):
    for spec in FAMILIES.values():
        batch = 2 if spec.text_is_padded else 1
        _, dataset, _ = look(spec.name, train_data=str(spoken), train_batch_size=batch, fps=16)
        assert {bucket.caption_tokens for bucket in dataset.grids} == {None}


@pytest.mark.parametrize(
    "caption", ["", "a", "é ü 🙂 日本", "a  b\n c", "a &amp; b", "<|im_start|> x", "x" * 510, "x" * 511, "x" * 512, "y z" * 300]
)
def test_a_counted_caption_is_as_long_as_the_encoded_one(tiny_checkpoint, caption):
    family, folder = tiny_family("kandinsky5_video"), str(tiny_checkpoint("kandinsky5_video"))
    with torch.no_grad():
        (text,) = family.encode_text(family.load_text_encoder(folder, torch.float32), [caption])
    assert family.count_tokens(folder, [caption]) == [text["prompt_embeds"].shape[0]]


# Held-out clips


def test_what_is_held_out_is_not_trained_on(config_file, clips):
    with pytest.raises(UserError, match=r"eval_data: .*clip-0.mp4 is in train_data too \(3 in all\)"):
        fit(read_plan(config_file(eval_data=str(clips))), Screen(quiet=True))


def test_a_share_is_held_out_by_content(config_file):
    whole = read_dataset(context_of(read_plan(config_file())))
    digests = {window.clip.digest for window in whole.clips.windows}
    screen = Listening()
    trained, held = read_datasets(context_of(read_plan(config_file(eval_share=0.3)), screen))
    assert {window.clip.digest for window in held.clips.windows} == {min(digests)}
    assert len(trained.clips.windows) + len(held.clips.windows) == len(whole.clips.windows)
    assert screen.notes == ["eval_share=0.3: 1 of 3 clips (33%) and 2 of 6 windows (33%) are held out"]
    for part, clips in ((trained, 2), (held, 1)):
        assert (len(part.clips.cuts), part.clips.ends) == (clips, 2 * clips)
    again, _ = read_datasets(context_of(read_plan(config_file(eval_share=0.3, seed=7))))
    assert samples_digest(again) == samples_digest(trained)


def test_copies_of_a_clip_are_on_one_side(look, clips, config_file, tmp_path):
    folder = Path(shutil.copytree(clips, tmp_path / "copied"))
    for name in ("clip-0", "clip-1", "clip-2"):
        for suffix in (".mp4", ".txt"):
            shutil.copy(folder / f"{name}{suffix}", folder / f"copy-of-{name}{suffix}")
    screen = Listening()
    trained, held = read_datasets(context_of(read_plan(config_file(train_data=str(folder), eval_share=0.4)), screen))
    sides = [{window.clip.digest for window in part.clips.windows} for part in (trained, held)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [2, 1]
    assert screen.notes == ["eval_share=0.4: 2 of 6 clips (33%) and 4 of 12 windows (33%) are held out"]


def test_a_single_clip_can_not_be_shared_out(config_file, clips, tmp_path):
    for name in ("one", "two"):
        render_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("blocks", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval_share=0.5: there is one clip, .*\n.*add clips, or give eval_data"):
        read_datasets(context_of(read_plan(config_file(train_data=str(tmp_path), eval_share=0.5))))


# What is decided about clips


@pytest.fixture
def unlike(clips, tmp_path) -> Path:
    """Clips that the size, the rate or the window of the config does not suit, and one that all of it does."""
    folder = tmp_path / "unlike"
    (folder / "more").mkdir(parents=True)
    render_clip(folder / "fine.mp4")
    render_clip(folder / "more" / "tall.mp4", height=384, width=96)
    render_clip(folder / "slow.mp4", fps=8)
    for number in range(7):
        render_image(folder / f"tiny-{number}.png", height=32, width=48, seed=number)
    for path in [*folder.rglob("*.mp4"), *folder.rglob("*.png")]:
        path.with_suffix(".txt").write_text("a square", encoding="utf-8")
    return folder


def test_what_is_done_to_clips_is_reported_by_kind(look, unlike):
    _, dataset, notes = look(train_data=str(unlike), fps=16)
    tiny = ", ".join(f"tiny-{number}.png (2 times)" for number in range(5))
    assert notes == [
        "the centre crop keeps less than half of the picture of more/tall.mp4 (17%); set aspect_buckets to true",
        f"smaller than height=64, width=96, and enlarged: {tiny} and 2 more; lower height and width",
        "slower than fps=16, and taken frame by frame, so that they run faster: slow.mp4 (2 times as fast); lower fps",
    ]
    found = {fact["file"]: fact for fact in decisions(dataset.clips)}
    assert found.keys() == {"tall.mp4", "slow.mp4", *(f"tiny-{number}.png" for number in range(7))}
    assert found["tall.mp4"] == {"file": "tall.mp4", "kept": 0.167, "enlarged": 1.0, "faster": 1.0}


def test_its_remedies_are_followed_by_silence(look, unlike):
    remedies = {"aspect_buckets": True, "height": 32, "width": 48, "fps": 8}
    assert look(train_data=str(unlike), num_frames=5, **remedies)[2] == []


def test_a_clip_that_no_bucket_suits_gets_another_remedy(look, tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    render_image(folder / "line.png", height=16, width=1600)
    (folder / "line.txt").write_text("a line", encoding="utf-8")
    notes = look(train_data=str(folder), aspect_buckets=True)[2]
    assert "line.png (" in notes[0]
    assert notes[0].endswith("; choose a height and width nearer to their shape")


def test_a_clip_of_a_list_is_named_by_its_place_beside_it(look, unlike):
    entry = '{"video": "more/tall.mp4", "caption": "a square"}\n'
    (unlike / "list.jsonl").write_text(entry, encoding="utf-8")
    (note,) = look(train_data=str(unlike / "list.jsonl"), fps=16)[2]
    assert "of more/tall.mp4 (17%)" in note


@pytest.mark.parametrize(("family", "fitting"), [("wan", 17), ("ltxvideo", 17), ("sanavideo", 17), ("kandinsky5_video", 17)])
def test_the_window_that_keeps_all_clips_is_one_of_the_family(look, clips_and_images, family, fitting):
    with pytest.raises(UserError) as caught:
        look(family, num_frames=33, fps=16)
    assert len(caught.value.problems) == 3
    for problem in caught.value.problems:
        assert (
            problem.fix
            == f"set num_frames to {fitting} (all 3 clips fit then), give a longer clip, or set unusable_clips to skip"
        )
    assert look(family, num_frames=fitting, fps=16)[2] == []
    _, _, notes = look(family, num_frames=33, fps=16, unusable_clips="skip")
    assert notes[-1] == f"num_frames=33 leaves out 3 of 3 clips: with num_frames={fitting} all 3 clips fit"


def test_where_nothing_is_left_the_window_is_named_too(look, clips):
    with pytest.raises(UserError) as caught:
        look(train_data=str(clips), num_frames=33, fps=16, unusable_clips="skip")
    (problem,) = caught.value.problems
    assert problem.fix == "add clips, or set num_frames to 17"


def test_dropped_frames_are_counted_by_their_cause(look, clips):
    plan, dataset, _ = look(train_data=str(clips), fps=16, max_windows_per_clip=1)
    assert dropped_in_words(dataset.clips) == (
        "33 dropped (6 at ends that fill no window, 27 in windows beyond max_windows_per_clip)"
    )
    facts = dataset_facts(plan, dataset, build_sampler(plan, dataset, world=1))
    assert facts["frames"] == {
        "used": 27,
        "dropped_at_ends": 6,
        "dropped_by_max_windows_per_clip": 27,
        "dropped_by_clip_mode": 0,
    }
    assert facts["decided"] == []
    _, dataset, _ = look(train_data=str(clips), fps=16, num_frames=5)
    assert dropped_in_words(dataset.clips) == "0 dropped"


# Captions


@pytest.fixture
def own(clips, tmp_path) -> Path:
    """A copy of the clips."""
    return Path(shutil.copytree(clips, tmp_path / "own"))


def test_all_that_is_wrong_with_a_dataset_is_one_error(look, own, tmp_path):
    (own / "clip-0.txt").unlink()
    (own / "clip-1.txt").write_bytes(b"\xe9t\xe9")
    render_clip(own / "short.mp4", frames=3)
    (own / "short.txt").write_text("short", encoding="utf-8")
    (own / "cut.mp4").write_bytes((own / "clip-2.mp4").read_bytes()[:300])
    with pytest.raises(UserError) as caught:
        look(train_data=str(own))
    whats = [problem.what for problem in caught.value.problems]
    assert whats[:2] == [f"{own / 'clip-1.txt'}: it is not UTF-8", "clip-0.mp4, cut.mp4: no caption"]
    assert [Path(what.partition(": ")[0]).name for what in whats[2:]] == ["cut.mp4", "short.mp4"]
    with pytest.raises(UserError) as caught:
        look(train_data=str(own), unusable_clips="skip", missing_captions="skip")
    assert [problem.what for problem in caught.value.problems] == whats[:1]


def test_what_is_wrong_with_the_held_out_clips_is_told_in_the_same_error(config_file, own, tmp_path):
    other = Path(shutil.copytree(own, tmp_path / "other"))
    (own / "clip-0.txt").unlink()
    (other / "clip-1.txt").unlink()
    with pytest.raises(UserError) as caught:
        read_datasets(context_of(read_plan(config_file(train_data=str(own), eval_data=str(other)))))
    assert [problem.what for problem in caught.value.problems] == ["clip-0.mp4: no caption", "eval_data: clip-1.mp4: no caption"]


def test_a_prefix_makes_another_dataset_and_other_cache_entries(look, own):
    plain, marked = look(train_data=str(own))[:2], look(train_data=str(own), caption_prefix="zxcq person, ")[:2]
    assert {window.clip.caption for window in marked[1].clips.windows} == {
        f"zxcq person, {window.clip.caption}" for window in plain[1].clips.windows
    }
    assert samples_digest(plain[1]) != samples_digest(marked[1])
    texts = [set(plan_caches(context_of(plan), dataset, teacher=False).text.items()) for plan, dataset in (plain, marked)]
    assert [caption for caption, _ in texts[0] & texts[1]] == [""]


def test_a_trigger_word_in_no_caption_is_noted(look, own):
    (note,) = look(train_data=str(own), trigger_word="zxcq person")[2]
    assert "no caption holds it" in note
    assert "caption_prefix to 'zxcq person, '" in note
    assert look(train_data=str(own), trigger_word="zxcq person", caption_prefix="zxcq person, ")[2] == []
    assert look(train_data=str(own), trigger_word="A  Square")[2] == []


def test_a_caption_that_is_cut_is_noted_with_its_count_and_place(look, own):
    (own / "clip-1.txt").write_text("seven words of some sort, and " * 20 + "at last an end that is not read", encoding="utf-8")
    (note,) = look(train_data=str(own))[2]
    length = len((own / "clip-1.txt").read_text(encoding="utf-8")) + 1
    assert note.startswith(f"clip-1.txt: {length} tokens, and 512 are read: the caption is cut after '...")
    assert look(train_data=str(own), missing_captions="filename", caption_prefix="x" * 600)[2][0].startswith("clip-0.txt: 6")
    for number in range(7):
        shutil.copy(own / "clip-1.mp4", own / f"more-{number}.mp4")
        shutil.copy(own / "clip-1.txt", own / f"more-{number}.txt")
    notes = look(train_data=str(own))[2]
    assert len(notes) == 6
    assert notes[-1] == "3 more captions are longer than the 512 tokens that the text encoder reads"


def test_a_dataset_of_short_captions_needs_no_tokenizer(look, own, tmp_path, tiny_checkpoint):
    bare = Path(shutil.copytree(tiny_checkpoint("wan"), tmp_path / "bare"))
    shutil.rmtree(bare / "tokenizer")
    (bare / "tokenizer").mkdir()
    where = {"train_data": str(own), "pretrained_model_name_or_path": str(bare)}
    assert look(**where)[2] == []
    (own / "clip-1.txt").write_text("long " * 200, encoding="utf-8")
    (note,) = look(**where)[2]
    assert "not counted, as its tokenizer is not downloaded yet" in note


@pytest.mark.parametrize("download", [True, False])
def test_a_tokenizer_is_downloaded_only_where_the_model_is_too(config_file, own, monkeypatch, wan, download):
    plan = read_plan(config_file(train_data=str(own)))
    (own / "clip-1.txt").write_text("long " * 200, encoding="utf-8")
    hub = plan.config.model.model_copy(update={"pretrained_model_name_or_path": "owner/name"})
    plan = replace(plan, config=plan.config.model_copy(update={"model": hub}))
    asked: list[str] = []

    def fetched(key, path, revision, patterns):
        asked.append(path)
        return wan

    monkeypatch.setattr(build, "fetch", fetched)
    screen = Listening()
    read_dataset(context_of(plan, screen), download=download)
    assert asked == (["owner/name"] if download else [])
    assert ("1000 tokens" if download else "not downloaded yet") in screen.notes[0]


def test_the_folders_of_runs_and_of_the_cache_hold_no_clips(look, own, tmp_path):
    for name in ("mine/samples", "other/samples", "cache/somewhere", "no-run"):
        (own / name).mkdir(parents=True)
        shutil.copy(own / "clip-0.mp4", own / name / "step-000002.mp4")
    for name in ("config.json", "status.json"):
        (own / "other" / name).write_text("{}", encoding="utf-8")
    (own / "no-run" / "config.json").write_text("{}", encoding="utf-8")
    changes = {"train_data": str(own), "output_dir": str(own / "mine"), "cache_dir": str(own / "cache")}
    with pytest.raises(UserError, match=r"^no-run/step-000002\.mp4: no caption\n"):
        look(**changes)
    (own / "no-run" / "step-000002.txt").write_text("x", encoding="utf-8")
    _, dataset, notes = look(**changes)
    assert {window.path.parent.name for window in dataset.clips.windows} == {"own", "no-run"}
    assert "not searched for clips, as folders of runs or of caches: cache, mine, other" in notes
