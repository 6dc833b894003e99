"""Nothing outside of the page's folders is listed or read, whatever an address, a config or a link says."""

import json
from pathlib import Path

import pytest
from recorded import write_run

from crepatrain.errors import UserError
from crepatrain.web.clips import read_clips, write_caption
from crepatrain.web.confinement import PATH_KEYS, Folders
from crepatrain.web.drafts import Draft


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    for name in ("runs", "data", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret\n")
    return Folders(tmp_path / "runs", (tmp_path / "data",), caches=(tmp_path / "cache",))


def test_every_key_that_holds_a_path_is_looked_at():
    from crepatrain.config.fields import PathText
    from crepatrain.config.run_config import SECTIONS

    checker = PathText.__metadata__[-1].func  # type: ignore[attr-defined]

    def holds_path(annotation) -> bool:
        marks = getattr(annotation, "__metadata__", ())
        parts = getattr(annotation, "__args__", ())
        return any(getattr(mark, "func", None) is checker for mark in marks) or any(map(holds_path, parts))

    found = {
        key
        for section in SECTIONS.values()
        for key, field in section.model_fields.items()
        if holds_path(field.annotation) or any(getattr(mark, "func", None) is checker for mark in field.metadata)
    }
    assert len(found) > 5
    assert found <= set(PATH_KEYS)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside", "a/../../outside", "/etc", "linked", "run/../../outside", "a\0b", ".ui"]
)
def test_a_name_that_leads_outside_is_no_run(folders, name, tmp_path):
    write_run(tmp_path / "outside" / "run")
    (tmp_path / "outside" / "metrics.jsonl").touch()
    write_run(folders.runs / "run")
    (folders.runs / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"no run|no such folder"):
        folders.run(name)
    assert folders.run_names() == ["run"]


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json", "status.json", "dataset.json", "changes.jsonl"])
def test_a_file_of_a_run_that_is_a_link_outside_is_not_read(folders, file, tmp_path):
    root = write_run(folders.runs / "run")
    (root / file).unlink(missing_ok=True)
    (root / file).symlink_to(tmp_path / "outside" / "secret.txt")
    with pytest.raises(UserError, match="a link to something outside"):
        folders.run("run")


def test_videos_behind_a_link_are_not_served(folders, tmp_path):
    root = write_run(folders.runs / "run")
    (tmp_path / "outside" / "step-000001.mp4").write_bytes(b"secret")
    for path in root.glob("samples/*"):
        path.unlink()
    (root / "samples" / "step-000001.mp4").symlink_to(tmp_path / "outside" / "step-000001.mp4")
    with pytest.raises(UserError, match="a link to something outside"):
        folders.run("run")


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("where", ["/etc/passwd", "~/.ssh", "{data}/../outside", "{data}/linked/secret.txt"])
def test_a_config_that_names_something_outside_has_a_problem_there(folders, key, where, tmp_path):
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "outside")
    text = where.format(data=tmp_path / "data")
    draft = Draft(folders)
    draft.replace({**draft.values, key: [text] if key == "validation_images" else text})
    [problem] = draft.check().of(key)
    assert "outside of the folders of this page" in problem.what


@pytest.mark.parametrize(
    ("key", "text"), [("pretrained_model_name_or_path", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), ("crepa_encoder", "dinov2_vitg14")]
)
def test_what_is_no_path_is_none(folders, key, text):
    assert folders.problems_of({key: text}) == []


def test_a_run_is_made_among_the_runs_alone(folders):
    for text in (
        str(folders.data[0] / "run"),
        str(folders.runs),
        str(folders.runs / ".hidden"),
        str(folders.runs / "a" / "b" / "c"),
    ):
        assert folders.problems_of({"output_dir": text})
    assert not folders.problems_of({"output_dir": str(folders.runs / "a" / "b")})


def test_no_config_from_outside_is_opened(folders, tmp_path):
    (tmp_path / "outside" / "config.json").write_text("{}")
    (folders.data[0] / "linked.json").symlink_to(tmp_path / "outside" / "config.json")
    with pytest.raises(UserError, match="outside of the folders"):
        Draft(folders).open(folders.data[0] / "linked.json")
    assert folders.configs() == []


def test_captions_behind_links_are_neither_shown_nor_written(folders, tmp_path):
    clip = folders.data[0] / "clip.mp4"
    clip.write_bytes(b"none")
    clip.with_suffix(".txt").symlink_to(tmp_path / "outside" / "secret.txt")
    found = read_clips(folders, folders.data[0])
    assert found.clips == ()
    assert "links lead outside" in found.notes[-1]
    assert "secret" not in json.dumps(found.notes)


def test_a_list_behind_a_link_is_not_read(folders, tmp_path):
    (folders.data[0] / "metadata.jsonl").symlink_to(tmp_path / "outside" / "secret.txt")
    with pytest.raises(UserError, match="outside of the folders"):
        read_clips(folders, folders.data[0])


def test_a_caption_is_written_beside_its_clip(folders):
    (folders.data[0] / "clip.mp4").write_bytes(b"none")
    [clip] = read_clips(folders, folders.data[0]).clips
    assert clip.caption is None
    write_caption(folders, clip, "a cat\nsleeps")
    assert (folders.data[0] / "clip.txt").read_text() == "a cat sleeps\n"
    assert read_clips(folders, folders.data[0]).clips[0].caption == "a cat sleeps"


@pytest.mark.parametrize("written", ["inline", "file"])
def test_datasets_that_are_named_lie_inside_too(folders, tmp_path, written):
    (folders.data[0] / "mine").mkdir()
    entries = [{"path": str(folders.data[0] / "mine")}, {"path": str(tmp_path / "outside")}, {"path": "../outside"}]
    file = folders.data[0] / "sets.json"
    file.write_text(json.dumps({"datasets": entries}), encoding="utf-8")
    train_data = entries if written == "inline" else str(file)
    problems = folders.problems_of({"train_data": train_data})
    assert [problem.what.split(" (")[0] for problem in problems] == ["dataset 2", "dataset 3"]
    if written == "file":
        with pytest.raises(UserError, match=r"outside: outside of the folders"):
            read_clips(folders, file)
    assert folders.problems_of({"train_data": entries[:1]}) == []
    assert folders.problems_of({"train_data": None}) == folders.problems_of({"train_data": 5}) == []


def test_the_clips_of_several_datasets_are_shown(folders):
    for name in ("a", "b"):
        (folders.data[0] / name).mkdir()
        (folders.data[0] / name / "clip.mp4").touch()
        (folders.data[0] / name / "clip.txt").write_text(name, encoding="utf-8")
    file = folders.data[0] / "sets.yaml"
    file.write_text("- path: a\n- path: b\n", encoding="utf-8")
    assert [(clip.path.parent.name, clip.caption) for clip in read_clips(folders, file).clips] == [("a", "a"), ("b", "b")]
