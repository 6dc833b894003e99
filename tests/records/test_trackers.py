"""What goes to TensorBoard and elsewhere is what metrics.jsonl holds."""

import io
import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.event_files import EventFile, _masked_crc
from crepatrain.records.events import Ended, Logged, StepDone, VideosMade
from crepatrain.records.runfolder import RunFolder
from crepatrain.records.trackers import scalars, tracking


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message, by the wire format's description alone."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        field, kind = key >> 3, key & 7
        if kind == 0:
            yield field, varint()
        elif kind == 2:
            size = varint()
            yield field, message[at : at + size]
            at += size
        else:
            size = {1: 8, 5: 4}[kind]
            yield field, struct.unpack({1: "<d", 5: "<f"}[kind], message[at : at + size])[0]
            at += size


def events(path: Path) -> Iterator[dict[int, Any]]:
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = content[12 : 12 + size]
        assert content[8:12] == _masked_crc(content[:8])
        assert content[12 + size : 16 + size] == _masked_crc(event)
        yield dict(fields(event))
        content = content[16 + size :]


def shown(folder: Path) -> dict[str, dict[int, Any]]:
    """What TensorBoard shows: tag -> step -> number or picture, of all files in their order."""
    found: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.iterdir()):
        first, start, *rest = events(path)
        assert first[3] == b"brain.Event:2"
        assert dict(fields(start[7])) == {1: 1}
        for values in found.values():
            for step in [step for step in values if step >= start[2]]:
                del values[step]
        for event in rest:
            for _, value in fields(event[5]):
                content = dict(fields(value))
                values = found.setdefault(content[1].decode(), {})
                assert event[2] not in values, "a step is there once"
                values[event[2]] = content[2] if 2 in content else content[4]
    return found


def test_the_checksum_is_crc_32c():
    """The vector of RFC 3720, B.4, masked as TFRecords are."""
    crc = 0xE3069283
    assert _masked_crc(b"123456789") == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def test_a_large_step_and_a_long_tag_survive(tmp_path: Path):
    file = EventFile(tmp_path, 0)
    file.add(3_000_000, {"x" * 300: 1.5})
    file.close()
    assert shown(tmp_path) == {"x" * 300: {3_000_000: 1.5}}


def test_trackers_are_subscribers_to_what_happens(config_file, tmp_path: Path):
    plan = read_plan(config_file())
    file = tmp_path / "step-000000.mp4"
    for writes in (True, False):
        folder = RunFolder(plan.config, writes=writes)
        with tracking(folder, 0) as subscribers:
            assert len(subscribers) == int(writes)
            for subscriber in subscribers:
                subscriber(StepDone(1, 0.5))
                subscriber(VideosMade(0, {"a": np.zeros((3, 8, 8, 3), np.uint8)}, file))
                subscriber(Logged({"step": 1, "loss": 0.5}))
                subscriber(Ended("completed", 1))
    found = shown(folder.tensorboard)
    assert found["train/loss"] == {1: 0.5}
    assert list(found["samples/a"]) == [0]
    assert len(found) == 2


def test_event_files_that_cant_be_written_are_reported(config_file, tmp_path: Path):
    folder = RunFolder(read_plan(config_file()).config)
    folder.root.mkdir()
    folder.tensorboard.touch()
    with (
        pytest.raises(UserError, match=r"tensorboard can't be written .*\n.*free disk space, or set report_to to \[\]"),
        tracking(folder, 0),
    ):
        pass


def test_tensorboard_has_the_lines_of_a_run_in_two_parts_once(config_file, tmp_path: Path):
    root = tmp_path / "run"
    fit(read_plan(config_file(max_train_steps=3, checkpointing_steps=2)), Screen(quiet=True))
    metrics = (root / "metrics.jsonl").read_text(encoding="utf-8")
    (root / "checkpoints" / "step-000003").rename(tmp_path / "lost")  # as if it had died behind its checkpoint
    fit(read_plan(config_file(max_train_steps=4, checkpointing_steps=2)), Screen(quiet=True))
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics
    found = shown(root / "tensorboard")
    assert len(list((root / "tensorboard").iterdir())) == 2
    for tag, key in (
        ("train/loss", "loss"),
        ("crepa/crepa_alignment_score", "crepa_alignment_score"),
        ("time/step_seconds", "step_seconds"),
    ):
        assert found[tag] == {line["step"]: pytest.approx(line[key]) for line in lines}
    assert list(found["train/loss"]) == [1, 2, 3, 4]


def test_tensorboard_itself_reads_it(tmp_path: Path):
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        file = EventFile(tmp_path, begin)
        for step in steps:
            file.add(step, {"train/loss": step + begin / 10})
        file.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 3)) for event in reader.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.2),
        (4, 4.2),
    ]


def test_validation_leaves_a_strip_of_frames_of_every_prompt(config_file, tmp_path: Path):
    """As TensorBoard reads it: as wide as its pictures, in their order, and what the run has made."""
    prompts = ["a square", "another", "another"]
    changes = {"validation_prompts": prompts, "validation_sampling_steps": 2, "max_train_steps": 1}
    fit(read_plan(config_file(**changes)), Screen(quiet=True))
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert reader.Tags()["images"] == ["samples/a square", "samples/another (2)", "samples/another (3)"]
    for tag in reader.Tags()["images"]:
        assert [event.step for event in reader.Images(tag)] == [0, 1]
    first = reader.Images("samples/a square")[0]
    strip = np.array(Image.open(io.BytesIO(first.encoded_image_string)))
    assert strip.shape == (64, 6 * 96 + 5 * 4, 3) == (first.height, first.width, 3)
    with av.open(str(tmp_path / "run" / "samples" / "step-000000.mp4")) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for place, frame in enumerate((0, 2, 3, 5, 6, 8)):
        away = np.abs(strip[:, place * 100 : place * 100 + 96].astype(int) - video[:, 22:86, :96]).mean(axis=(1, 2, 3))
        assert away.argmin() == frame, away  # both have been compressed


def test_what_was_not_measured_is_left_out():
    line = {"step": 3, "loss": 1, "crepa_loss": None, "crepa_cutoff": True, "crepa_seconds": 0.5, "sigma_loss": {"0.0-0.2": 2.0}}
    assert scalars(line) == {"train/loss": 1.0, "crepa/crepa_cutoff": 1.0, "time/crepa_seconds": 0.5, "sigma_loss/0.0-0.2": 2.0}


def test_nothing_is_written_where_nothing_is_wanted(config_file, tmp_path: Path):
    fit(read_plan(config_file(max_train_steps=1, report_to=[])), Screen(quiet=True))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_option_takes_one_name_or_several(config_file):
    assert read_plan(config_file(), ["--report_to", "tensorboard"]).config.loop.report_to == ["tensorboard"]
    assert read_plan(config_file(), ["--report_to=[]"]).config.loop.report_to == []
    with pytest.raises(UserError, match="did you mean tensorboard"):
        read_plan(config_file(report_to=["tensorbord"]))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_package_that_is_missing_is_reported_early(config_file):
    with pytest.raises(UserError, match=r"report_to=wandb: wandb is not installed\n.*crepatrain\[wandb\]"):
        read_plan(config_file(), ["--report_to", "tensorboard,wandb"])
