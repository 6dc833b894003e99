"""What no single module can promise: shipped configs, the README's keys, and what must never be imported."""

import re
from pathlib import Path

import pytest

import crepatrain
from crepatrain.config.load import parse, read_values
from crepatrain.config.sections import CrepaConfig, RunConfig
from crepatrain.errors import Problem

ROOT = Path(__file__).parents[1]
SOURCES = sorted(Path(crepatrain.__file__).parent.rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = {
    "crepa_loss",
    "crepa_alignment_score",
    "crepa_alignment_score_ema",
    "crepa_similarity_self",
    "crepa_weight",
    "crepa_cutoff",
}


def test_every_shipped_config_parses():
    for path in sorted((ROOT / "configs").glob("*.*")):
        problems: list[Problem] = []
        config, wrong = parse(read_values(path, (), problems), problems)
        assert not problems, path
        assert not wrong
        assert config is not None


def test_the_readme_names_no_key_that_is_not_there():
    named = set(re.findall(r"\bcrepa_[a-z_]*[a-z]\b(?!\.py)", README))
    assert named <= RunConfig.model_fields.keys() | METRICS


@pytest.mark.parametrize("key", CrepaConfig.model_fields)
def test_the_readme_tells_every_key_of_crepa(key):
    assert f"`{key}`" in README


@pytest.mark.parametrize("refused", [r"torch\.hub", "trust_remote_code", r"weights_only\s*=\s*False", r"\bpickle\b"])
def test_nothing_runs_code_out_of_a_download(refused):
    assert SOURCES
    assert not [path for path in SOURCES if re.search(refused, path.read_text(encoding="utf-8"))]


def test_what_torch_loads_holds_tensors_only():
    calls = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in calls)
