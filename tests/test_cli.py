"""The command line: exit codes, streams, no traceback, nothing written where nothing was done."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from common import tiny_family

import crepatrain
from crepatrain import cli
from crepatrain.config.plan import read_plan
from crepatrain.config.run_config import KEYS
from crepatrain.specs import FAMILIES

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "decord", "av")
COMMANDS = ("validate-config", "dry-run", "cache", "fit")


@dataclass(frozen=True)
class Result:
    """Whitespace is folded: rich wraps to the terminal's width."""

    code: int
    out: str
    errors: str


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Result]:
    def command(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["crepatrain", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Result(code, " ".join(captured.out.split()), " ".join(captured.err.split()))

    return command


def files_below(*folders: Path) -> Iterator[tuple[Path, int]]:
    for folder in folders:
        for path in folder.rglob("*"):
            yield path, path.stat().st_mtime_ns


def in_a_process(*words: object, code: str = "from crepatrain.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


# Quick, and with nothing heavy

_LISTED = """
import atexit, sys, time
atexit.register(lambda: print("seconds", time.process_time(), *sys.modules))
from crepatrain.cli import main
main()
"""


@pytest.mark.parametrize(
    ("words", "changes", "code"),
    [
        (["validate-config"], {}, 0),
        (["validate-config"], {"num_frames": 50}, 2),
        (["validate-config"], {"pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, 0),
        (["validate-config"], {"pretrained_model_name_or_path": "some/thing"}, 2),
        (["validate-config"], {"lora_targets": ["to_q", "to_z"]}, 2),
        (["validate-config"], {"lora_targets": r"blocks\..*to_z"}, 2),
        (["validate-config"], {"lora_targets": r"blocks\..*to_q"}, 0),
        (["validate-config"], {"task": "i2v"}, 2),
        (["validate-config"], {"model_type": "full"}, 0),
        (["fit"], {"num_frames": 50}, 2),
        (["validate-config", "--schema"], None, 0),
        (["families"], None, 0),
        (["--help"], None, 0),
        (["--version"], None, 0),
    ],
)
def test_what_needs_no_weights_loads_no_torch_and_answers_at_once(config_file, words, changes, code):
    result = in_a_process(*words, *([] if changes is None else [config_file(**changes)]), code=_LISTED)
    assert result.returncode == code, result.stderr
    _, seconds, *modules = result.stdout[result.stdout.rindex("seconds") :].split()
    assert not set(HEAVY) & set(modules)
    assert float(seconds) < 1


# What is printed where


def test_a_good_config_is_shown_in_words(run, config_file):
    result = run("validate-config", config_file())
    assert result.code == 0
    assert result.errors == ""
    for words in ("block 8 of 0 to 9", "two frames 1 away", "maximum here is 1.491", "the config is valid"):
        assert words in result.out


def test_warnings_are_notes_and_no_errors(run, config_file):
    result = run("validate-config", config_file(crepa_adjacent_distance=7))
    assert result.code == 0
    assert "note: crepa_adjacent_distance=7" in result.out


def test_options_win_over_the_file(run, config_file):
    result = run("validate-config", config_file(), "--crepa_lambda", "0.3", "--crepa-adjacent-tau=2", "--num-frames", 17)
    assert result.code == 0
    assert "17 frames" in result.out
    assert "weight 0.3" in result.out
    assert "exp(-distance / 2)" in result.out


def test_an_option_before_the_file_is_reported_with_its_place(run, config_file):
    result = run("validate-config", "--crepa-lambda=0.3", config_file())
    assert result.code == 2
    assert "--crepa-lambda=0.3" in result.errors
    assert "after the config file" in result.errors


def test_the_schema_is_printed_for_editors(run):
    result = run("validate-config", "--schema")
    assert result.code == 0
    assert json.loads(result.out)["properties"].keys() >= KEYS.keys()


def test_a_command_without_its_file_is_refused(run):
    for command in COMMANDS:
        result = run(command)
        assert result.code == 2
        assert "config" in result.errors.lower()


def test_families_are_listed(run):
    result = run("families")
    assert result.code == 0
    for word in ("wan", "480x832", "81", "16", "t2v, i2v", "8k+1, 32n", "4k+1, 128n"):
        assert word in result.out
    for name, spec in FAMILIES.items():
        assert f"{name} {spec.default_block};" in result.out
        for model, shapes in spec.released.items():
            assert f"{model} {shapes.repo}" in result.out


def test_the_version_is_printed(run):
    assert run("--version").out == crepatrain.__version__


# Bad input

BAD_VALUES = [
    {"num_frames": 50},
    {"height": 100},
    {"crepa_lamda": 0.1},
    {"network_dim": 4},
    {"learning_rate": "fast"},
    {"model_family": "wann"},
    {"crepa_scheduler": "cosin"},
    {"crepa_encoder": "dinov2_vitb15"},
    {"crepa_encoder": "some/thing"},
    {"crepa_block_index": 10},
    {"crepa_teacher_block_index": 3, "crepa_feature_source": "backbone"},
    {"crepa_similarity_threshold": 3},
    {"lora_targets": []},
    {"lora_targets": ["to_z"]},
    {"lora_targets": "to_z"},
    {"task": "i2v"},
    {"wan_expert": "high"},
    {"train_data": "/nowhere"},
    {"pretrained_model_name_or_path": "/nowhere"},
    {"pretrained_model_name_or_path": "some/thing"},
    {"output_dir": __file__},
    {"output_dir": "a\0b"},
    {"[red]markup[/red]": 1},
    {"max_train_steps": ...},
    {"output_dir": ...},
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("changes", BAD_VALUES, ids=lambda changes: next(f"{k}={v!r}" for k, v in changes.items()))
def test_a_wrong_config_is_refused_before_anything_is_written(run, config_file, tmp_path, values, command, changes):
    path = config_file(**changes)
    before = set(files_below(tmp_path, Path(values["cache_dir"])))
    result = run(command, path)
    assert result.code == 2
    assert result.out == ""
    assert result.errors.startswith("error: ")
    assert " -> " in result.errors
    assert next(iter(changes)) in result.errors
    assert "Traceback" not in result.errors
    assert set(files_below(tmp_path, Path(values["cache_dir"]))) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"seed": 1,}', '{"seed": 1, "seed": 2}', '{"a": ' * 100_000, '{"seed": ' + "1" * 5000 + "}"]
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_broken_file_is_refused_without_a_traceback(run, tmp_path, text, suffix):
    path = tmp_path / f"config{suffix}"
    path.write_text(text, encoding="utf-8")
    result = run("validate-config", path)
    assert result.code == 2
    assert result.errors.startswith("error: ")


def test_the_process_ends_as_the_exit_code_says(config_file):
    good = in_a_process("validate-config", config_file())
    assert (good.returncode, good.stderr) == (0, "")
    bad = in_a_process("validate-config", config_file(num_frames=50, height=100))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.splitlines() == [
        "error: num_frames=50: this model takes 4k+1 frames",
        "  -> use 49 or 53",
        "error: height=100: this model takes multiples of 16",
        "  -> use 96 or 112",
    ]


def test_an_offline_hub_is_reported_as_offline(config_file):
    path = config_file(pretrained_model_name_or_path="some/thing")
    result = in_a_process("fit", path)
    assert result.returncode == 2
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    for words in ("pretrained_model_name_or_path=some/thing", "HF_HUB_OFFLINE is set", "hf auth login", "hf download some/thing"):
        assert words in result.stderr


def test_markup_in_a_value_is_text(run, config_file):
    result = run("validate-config", config_file(train_data="/nowhere/[bold]x[/bold]"))
    assert "train_data=/nowhere/[bold]x[/bold]" in result.errors


# Bad data: found by looking at the clips, before the run's folder is claimed


@pytest.fixture
def own_clips(clips, tmp_path) -> Path:
    return Path(shutil.copytree(clips, tmp_path / "own"))


@pytest.mark.parametrize("command", ["dry-run", "fit"])
def test_clips_that_can_not_be_used_are_refused_by_name(run, config_file, own_clips, values, command):
    (own_clips / "clip-0.txt").unlink()
    result = run(command, config_file(train_data=str(own_clips)))
    assert result.code == 2
    assert "clip-0.mp4: no caption" in result.errors
    assert "missing_captions" in result.errors

    (own_clips / "clip-0.txt").write_text("a caption", encoding="utf-8")
    (own_clips / "clip-1.mp4").write_bytes((own_clips / "clip-1.mp4").read_bytes()[:2000])
    (own_clips / "clip-2.mp4").write_bytes(b"")
    result = run(command, config_file(train_data=str(own_clips)))
    assert result.code == 2
    assert "clip-1.mp4" in result.errors
    assert "clip-2.mp4: the file is empty" in result.errors
    assert "unusable_clips" in result.errors

    result = run(command, config_file(train_data=str(own_clips), num_frames=81, unusable_clips="error"))
    assert result.code == 2
    assert "num_frames=81" in result.errors
    assert "20 frames" in result.errors

    for path in own_clips.glob("*.mp4"):
        path.unlink()
    result = run(command, config_file(train_data=str(own_clips)))
    assert result.code == 2
    assert f"train_data={own_clips}: no video files" in result.errors
    assert not Path(values["output_dir"]).exists()


def test_a_run_never_takes_a_folder_that_is_not_its_own(run, config_file, values):
    folder = Path(values["output_dir"])
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    result = run("fit", config_file())
    assert result.code == 2
    assert f"output_dir={folder}" in result.errors
    assert "thesis.txt" in result.errors
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_run_is_refused_with_the_differences(run, config_file, values):
    folder = Path(values["output_dir"])
    folder.mkdir()
    other = read_plan(config_file(seed=1, crepa_lambda=0.25)).config
    (folder / "config.json").write_text(json.dumps(other.model_dump()), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    before = set(files_below(folder))
    result = run("fit", config_file())
    assert result.code == 2
    assert f"output_dir={folder} holds a different run" in result.errors
    assert "seed: 1 there, 42 here" in result.errors
    assert "crepa_lambda: 0.25 there, 0.5 here" in result.errors
    assert set(files_below(folder)) == before


def test_a_models_own_folder_is_never_taken(run, config_file, wan, tmp_path):
    folder = Path(shutil.copytree(wan / "encoder", tmp_path / "encoder"))  # it has a config.json too
    before = set(files_below(folder))
    result = run("fit", config_file(output_dir=str(folder), max_train_steps=1))
    assert result.code == 2
    assert f"output_dir={folder}" in result.errors
    assert set(files_below(folder)) == before


def test_a_folder_that_can_not_be_made_is_refused(run, config_file):
    result = run("fit", config_file(output_dir="/proc/crepatrain/run"))  # not even root can write there
    assert result.code == 2
    assert "output_dir=/proc/crepatrain/run" in result.errors


def test_a_run_that_failed_before_its_first_step_may_be_fixed(run, config_file, values, wan, tmp_path):
    broken = Path(shutil.copytree(wan, tmp_path / "broken"))
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    result = run("fit", config_file(pretrained_model_name_or_path=str(broken)))
    assert result.code == 2
    assert str(broken / "transformer") in result.errors
    result = run("fit", config_file(max_train_steps=1))
    assert result.code == 0, result.errors
    assert (Path(values["output_dir"]) / "pytorch_lora_weights.safetensors").is_file()


# Commands


def test_a_dry_run_prints_its_table_and_writes_no_run(run, config_file, values, tmp_path):
    values["cache_dir"] = str(tmp_path / "cache")
    result = run("dry-run", config_file())
    assert result.code == 0
    for words in (
        "9 x 64 x 96",
        "3 x 4 x 6",
        "72",
        "4x6",
        "clips 3 used, 0 left out",
        "frames 54 used, 6 dropped (6 at ends that fill no window)",
        "windows 6",
        "steps per epoch 6",
        "adapter 30,720",
        "projector",
        "latents",
        "teacher features",
    ):
        assert words in result.out
    assert not Path(values["output_dir"]).exists()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"index", "digests.json"}


def test_a_dry_run_counts_every_weight_where_every_weight_is_trained(run, config_file):
    result = run("dry-run", config_file(model_type="full"))
    assert result.code == 0
    weights = sum(parameter.numel() for parameter in tiny_family().empty_transformer().parameters())
    assert f"transformer {weights:,}" in result.out
    assert "adapter" not in result.out.partition("trainable parameters")[2].partition("cache")[0]


def test_a_dry_run_counts_first_frames(run, config_file, tiny_checkpoint):
    of = {"model_family": "ltxvideo", "pretrained_model_name_or_path": str(tiny_checkpoint("ltxvideo"))}
    sizes = [run("dry-run", config_file(**of, task=task)).out.partition("latents ")[2].split(" ")[0] for task in ("t2v", "i2v")]
    assert float(sizes[0]) < float(sizes[1])


def test_make_random_refuses_what_it_does_not_know(run, tmp_path):
    target = tmp_path / "new"
    result = run("make-random", "wann", target)
    assert result.code == 2
    assert "family wann" in result.errors
    assert "did you mean wan?" in result.errors
    result = run("make-random", "wan", target, "--size", "wan2.1-1.2b")
    assert result.code == 2
    assert "--size wan2.1-1.2b" in result.errors
    assert "did you mean wan2.1-1.3b?" in result.errors
    result = run("make-random", "wan", target, "--size", "huge")
    assert result.code == 2
    assert "wan2.1-1.3b, wan2.1-14b" in result.errors
    assert not target.exists()


def test_make_random_never_writes_over_anything(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.txt").write_text("mine", encoding="utf-8")
    for target in (tmp_path / "full", tmp_path / "full" / "model.txt"):
        result = run("make-random", "wan", target)
        assert result.code == 2
        assert f"folder {target}: it already exists" in " ".join(result.errors.split())
        assert "give a new name" in result.errors
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "model.txt"]


def test_make_random_says_where_it_cannot_write(run, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    result = run("make-random", "wan", tmp_path / "file" / "wan")
    assert result.code == 2
    assert str(tmp_path / "file" / "wan") in result.errors
