"""What no single module can promise: shipped configs, the README's keys, and what must never be imported."""

import json
import re
import textwrap
from pathlib import Path

import pytest

import crepatrain
from crepatrain.config.alignment_sections import CrepaConfig
from crepatrain.config.load import parse, read_values
from crepatrain.config.memory_checks import MEMORY_KEYS
from crepatrain.config.plan import read_plan
from crepatrain.config.run_config import KEYS
from crepatrain.data.cutting import nearest_aspect
from crepatrain.errors import Problem
from crepatrain.specs import FAMILIES

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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*-*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_is_a_plan_without_a_download(path, clips):
    plan = read_plan(path, ["--train_data", str(clips)], online=False)
    assert plan.config.crepa.crepa_enabled
    assert plan.config.crepa.crepa_scheduler == ("constant" if plan.task == "i2v" else "cosine") or "solid" in path.stem
    assert plan.warnings == ()
    assert (plan.config.data.aspect_buckets, plan.config.data.frame_buckets) == (True, "auto")
    for shape in ((1080, 1920), (1920, 1080), (480, 640), (1000, 1000), (500, 2000)):
        size = nearest_aspect(shape, plan.size[1:], plan.geometry.size_multiple)
        tokens = plan.geometry.token_grid(plan.size[0], *size).tokens
        assert tokens <= plan.grid.tokens, "no clip needs more memory than the size that is estimated"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*gb.json")), ids=lambda path: path.stem)
def test_a_config_for_a_card_leaves_the_choice_to_it(path, clips):
    assert read_plan(path, ["--train_data", str(clips)], online=False).open_keys == MEMORY_KEYS


def test_every_family_and_task_has_a_config():
    plans = [parse(read_values(path, (), []), [])[0] for path in (ROOT / "configs").glob("*-*.json")]
    known = {(spec.name, task) for spec in FAMILIES.values() for task in spec.pipelines}
    assert {(plan.model.model_family, "i2v" if "i2v" in plan.loop.output_name else "t2v") for plan in plans} == known


def test_every_shipped_config_parses():
    for path in sorted((ROOT / "configs").glob("*.*")):
        problems: list[Problem] = []
        config, wrong = parse(read_values(path, (), problems), problems)
        assert not problems, path
        assert not wrong
        assert config is not None


def test_the_readme_names_no_key_that_is_not_there():
    named = set(re.findall(r"\bcrepa_[a-z_]*[a-z]\b(?!\.py)", README))
    assert named <= KEYS.keys() | METRICS


@pytest.mark.parametrize(("key", "field"), CrepaConfig.model_fields.items())
def test_the_readme_explains_every_key_of_crepa_as_the_schema_does(key, field):
    assert f"| `{key}` | `{json.dumps(field.default)}` | {field.description} |" in README


def test_the_guide_quotes_the_code_as_it_is():
    guide = (ROOT / "docs" / "new-family.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    blocks = [part for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) for part in block.split("\n\n")]
    assert len(blocks) > 4
    bare = [textwrap.dedent(block).strip("\n") for block in blocks]
    assert [block for block in bare if block not in code and textwrap.indent(block, "    ") not in code] == []


@pytest.mark.parametrize("refused", [r"torch\.hub", "trust_remote_code", r"weights_only\s*=\s*False", r"\bpickle\b"])
def test_nothing_runs_code_out_of_a_download(refused):
    assert SOURCES
    assert not [path for path in SOURCES if re.search(refused, path.read_text(encoding="utf-8"))]


def test_what_torch_loads_holds_tensors_only():
    calls = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in calls)


def test_no_file_is_too_long_to_be_read():
    long = {str(path.name): count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 420}
    assert not long
