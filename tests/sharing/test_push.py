"""What goes to the hub, through its real client, to a server on this machine."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from common import tiny_values
from hub import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import save_file

from crepatrain.commands.fit import fit
from crepatrain.commands.push import push
from crepatrain.commands.sample import SampleOptions, sample
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.events import CheckpointSaved
from crepatrain.running import validation
from crepatrain.sharing.hub import upload
from crepatrain.stopping import Stopped

PROMPTS = ["a red square", 'with "quotes" | and: übel']


@pytest.fixture
def hub(monkeypatch, tmp_path):
    state = Hub()
    server = state.serve()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, wan, clips):
    root = tmp_path_factory.mktemp("pushed")
    values = tiny_values(wan, clips, root / "crush", tmp_path_factory) | {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "lora_alpha": 8,
        "learning_rate": 0.05,
        "validation_prompts": PROMPTS,
        "validation_sampling_steps": 2,
        "trigger_word": "CRUSH it",
    }
    path = root / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    sample(root / "crush", SampleOptions(prompt="CRUSH it now", steps=2, frames=5), Screen(quiet=True))
    return root / "crush"


def test_a_run_is_pushed_with_its_videos_and_a_card(trained, hub, clips, wan, capsys):
    push(trained, Screen())
    assert hub.private == {"me/crush": True}
    files = hub.repos["me/crush"]
    assert set(files) == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "samples/sample-42-beside-base.mp4",
        "samples/step-000000.mp4",
        "samples/step-000002.mp4",
    }
    for place in files:
        assert files[place] == (trained / place).read_bytes()
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["instance_prompt"] == "CRUSH it"
    assert data["pipeline_tag"] == "text-to-video"
    assert {"lora", "crepa", "diffusers", "wan2.1"} <= set(data["tags"])
    assert [shown["text"] for shown in data["widget"]] == [
        "CRUSH it now",
        "; ".join(PROMPTS),
        "before training: " + "; ".join(PROMPTS),
    ]
    assert {shown["output"]["url"] for shown in data["widget"]} <= set(files)
    assert 'load_lora_weights("me/crush", weight_name="pytorch_lora_weights.safetensors")' in card.text
    for secret in (str(clips), str(wan), str(trained.parent), "a square moves"):
        assert secret not in files["README.md"].decode()
    out = capsys.readouterr().out
    assert "private: only you see it" in out
    assert "the card can't link its base" in out


def test_the_cards_own_code_samples_what_the_recipe_says(trained, hub, tmp_path, monkeypatch):
    """The snippet is run as it is, on the CPU, with two steps and the files of the card's repository on this disk."""
    push(trained, Screen(quiet=True), dry=True)
    text = (trained / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    config = json.loads((trained / "config.json").read_text())
    for old, new in (
        ('.to("cuda")', ""),
        ("torch.bfloat16", "torch.float32"),
        ("num_inference_steps=50", "num_inference_steps=2"),
        (
            f'from_pretrained("{Path(config["pretrained_model_name_or_path"]).name}"',
            f'from_pretrained("{config["pretrained_model_name_or_path"]}"',
        ),
        ('load_lora_weights("crush"', f'load_lora_weights("{trained}"'),
        (
            "from diffusers.utils import export_to_video",
            "seen = []\ndef export_to_video(*given, **named): seen.append((given, named))",
        ),
    ):
        assert old in code
        code = code.replace(old, new)
    variables = {}
    exec(compile(code, "card", "exec"), variables)
    ((video, path), named) = variables["seen"][0]
    assert video.shape == (9, 64, 96, 3)
    assert (path, named) == ("video.mp4", {"fps": 16})


def test_what_the_owner_wrote_stays(trained, hub):
    push(trained, Screen(quiet=True), repo="club/other", private=False)
    assert hub.private == {"club/other": False}
    mine = hub.repos["club/other"]["README.md"].decode().replace("---\n", "---\nlicense: apache-2.0\n", 1)
    mine = mine.replace("- lora\n", "- lora\n- mine\n")
    hub.repos["club/other"]["README.md"] = f"{mine}\n## My own words\n".encode()
    push(trained, Screen(quiet=True), repo="club/other", step=1)
    text = hub.repos["club/other"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "mine" in card.data.tags
    assert text.endswith("## My own words\n")
    assert text.count("## Use it") == 1
    assert "after 1 steps" in text
    with safe_open(trained / "adapters" / "adapter-000001.safetensors", framework="pt") as file:
        assert file.metadata()["crepatrain.step"] == "1"
    assert (
        hub.repos["club/other"]["pytorch_lora_weights.safetensors"]
        == (trained / "adapters" / "adapter-000001.safetensors").read_bytes()
    )


def test_a_card_that_cant_be_read_is_never_replaced(trained, hub, monkeypatch):
    for _ in range(2):
        push(trained, Screen(quiet=True))
    before = dict(hub.repos["me/crush"])
    hub.hides = 403
    with pytest.raises(UserError, match=r"me/crush: "):
        push(trained, Screen(quiet=True))
    hub.hides = 0
    for damage, message in (
        (lambda card: card.replace("library_name: diffusers", "library_name: [diffusers"), "the card's metadata can't be read"),
        (lambda card: card.replace("---\n", "---\n1: 2\n", 1), "the card's metadata can't be read"),
        (lambda card: card.replace("<!-- crepatrain: end -->", "## My words"), "the card has lost the line <!-- crepatrain: end"),
    ):
        hub.repos["me/crush"]["README.md"] = damage(before["README.md"].decode()).encode()
        with pytest.raises(UserError, match=message):
            push(trained, Screen(quiet=True))
        assert hub.repos["me/crush"]["README.md"] == damage(before["README.md"].decode()).encode()
    (trained / "README.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"README.md can't be read"):
        push(trained, Screen(quiet=True), dry=True)
    (trained / "README.md").unlink()


def test_a_card_of_ones_own_is_set_aside_for_the_hubs(trained, hub, capsys):
    push(trained, Screen(quiet=True))
    card = trained / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nmy words\n", encoding="utf-8")
    push(trained, Screen())
    assert "the old file is kept as" in " ".join(capsys.readouterr().out.split())
    assert "my words" in max(trained.glob("README.md.left*")).read_text(encoding="utf-8")
    assert b"my words" not in hub.repos["me/crush"]["README.md"]


def test_words_before_the_first_push_go_along(trained, hub):
    push(trained, Screen(quiet=True), dry=True)
    card = trained / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nmy words\n", encoding="utf-8")
    push(trained, Screen(quiet=True))
    assert b"my words" in hub.repos["me/crush"]["README.md"]
    card.unlink()


def test_the_numbers_are_those_of_the_step(trained, hub):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        push(trained, Screen(quiet=True), step=step, dry=True)
        row = f"| diffusion loss | {lines[0]['diffusion_loss']:.4f} | {lines[step - 1]['diffusion_loss']:.4f} |"
        assert row in (trained / "README.md").read_text(encoding="utf-8")


def test_an_adapter_of_the_first_version_gets_its_card(trained, hub, tmp_path):
    root = tmp_path / "old"
    shutil.copytree(trained, root)
    path = root / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata["crepatrain.digest"]
    recipe = json.loads(metadata["crepatrain.recipe"])
    recipe["train"]["resolution"] = recipe["train"].pop("resolutions")[0]
    save_file(tensors, path, metadata | {"crepatrain.recipe": json.dumps(recipe)})
    push(root, Screen(quiet=True), dry=True)
    assert "9 of 96 x 64" in (root / "README.md").read_text(encoding="utf-8")


def test_a_video_of_a_caption_stays_here(hub, config_file, tmp_path):
    fit(read_plan(config_file(max_train_steps=1)), Screen(quiet=True))
    sample(tmp_path / "run", SampleOptions(steps=2, frames=5), Screen(quiet=True))
    push(tmp_path / "run", Screen(quiet=True))
    assert set(hub.repos["me/run"]) == {"README.md", "pytorch_lora_weights.safetensors"}
    assert b"a square moves" not in hub.repos["me/run"]["README.md"]


def test_a_dry_run_asks_the_hub_for_nothing(trained, hub, capsys):
    push(trained, Screen(), dry=True)
    assert hub.asked == []
    assert "nothing was uploaded" in capsys.readouterr().out
    assert (trained / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_fit_pushes_what_it_has_trained(hub, config_file, tmp_path):
    fit(
        read_plan(config_file(max_train_steps=1, push_to_hub=True, hub_model_id="club/fitted", hub_private_repo=False)),
        Screen(quiet=True),
    )
    assert {"README.md", "pytorch_lora_weights.safetensors"} == set(hub.repos["club/fitted"])
    assert hub.private["club/fitted"] is False


def test_a_run_that_is_asked_to_stop_is_not_uploaded(hub, config_file, tmp_path, capsys, monkeypatch):
    def interrupted(*_given):
        os.kill(os.getpid(), signal.SIGINT)
        return made(*_given)

    def interrupt_behind_a_checkpoint(event):
        if isinstance(event, CheckpointSaved):
            os.kill(os.getpid(), signal.SIGINT)

    made = validation.call
    monkeypatch.setattr(validation, "call", interrupted)
    plan = read_plan(config_file(max_train_steps=1, push_to_hub=True, validation_prompts=["a"], validation_sampling_steps=2))
    with pytest.raises(Stopped):
        fit(plan, Screen(quiet=True))  # its base's video
    monkeypatch.setattr(validation, "call", made)
    fit(plan, Screen(), subscribers=[interrupt_behind_a_checkpoint])
    assert "not uploaded, as a stop was asked for" in capsys.readouterr().out
    assert hub.repos == {}
    fit(plan, Screen(quiet=True))  # makes the video that the stop has cost
    assert "samples/step-000001.mp4" in hub.repos["me/run"]
    fit(plan, Screen())
    assert "`crepatrain push" in capsys.readouterr().out


def test_nothing_begins_where_the_hub_would_refuse(hub, config_file, tmp_path, monkeypatch):
    plan = read_plan(config_file(push_to_hub=True))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"run: the hub does not let you write there.*\n.*hf auth login"):
        fit(plan, Screen(quiet=True))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.role = "read"
    with pytest.raises(UserError, match=r"your token for the hub may only read\n.*hf auth login"):
        fit(plan, Screen(quiet=True))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"the hub does not know who you are\n.*hf auth login"):
        fit(plan, Screen(quiet=True))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fit(plan, Screen(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_hub_that_fails_behind_the_training_loses_nothing(hub, config_file, tmp_path):
    hub.refuses = 403
    with pytest.raises(UserError, match="the hub does not let you write there"):
        fit(read_plan(config_file(max_train_steps=1, push_to_hub=True)), Screen(quiet=True))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "completed"
    hub.refuses = 0
    push(tmp_path / "run", Screen(quiet=True))
    assert "pytorch_lora_weights.safetensors" in hub.repos["me/run"]


def test_a_card_that_the_hub_dislikes_is_reported(trained, hub):
    hub.dislikes = "license is odd"
    with pytest.raises(UserError, match=r"me/crush: .*license is odd"):
        push(trained, Screen(quiet=True))
    assert hub.repos == {}, "nothing is made there"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"step": 7}, "adapter-000007.safetensors can't be read"),
        ({"repo": "a/b/c"}, "a/b/c: not the name of a repository"),
        ({"repo": "bad--name"}, "bad--name: not the name of a repository"),
    ],
)
def test_what_cant_be_pushed_is_reported(trained, hub, asked, message):
    with pytest.raises(UserError, match=message):
        push(trained, Screen(quiet=True), **asked)
    assert hub.repos == {}


def test_a_whole_transformer_is_pushed_as_a_folder(hub, config_file, tmp_path):
    fit(read_plan(config_file(model_type="full", max_train_steps=1)), Screen(quiet=True))
    push(tmp_path / "run", Screen(quiet=True))
    files = hub.repos["me/run"]
    inside = ("config.json", "diffusion_pytorch_model.safetensors", "manifest.json")
    assert {"README.md", *(f"transformer/{name}" for name in inside)} == set(files)
    text = files["README.md"].decode()
    assert 'WanTransformer3DModel.from_pretrained("me/run", subfolder="transformer"' in text
    assert "finetune" not in text  # its base is no repository
    assert "A whole transformer" in text


def test_a_file_that_is_gone_is_not_the_hubs_fault(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    files = {"README.md": tmp_path / "README.md", "video.mp4": tmp_path / "video.mp4"}
    with pytest.raises(UserError, match=r"video\.mp4 can't be read"):
        upload("me/run", files, private=True, message="a step")
    assert hub.asked == []


def test_a_damaged_checkpoint_of_a_whole_transformer_is_reported(hub, config_file, tmp_path):
    fit(read_plan(config_file(model_type="full", max_train_steps=1)), Screen(quiet=True))
    (tmp_path / "run" / "checkpoints" / "step-000001" / "fingerprint.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged: the content of fingerprint\.json"):
        push(tmp_path / "run", Screen(quiet=True), dry=True)


def test_an_untrained_adapter_is_not_pushed(hub, config_file, tmp_path):
    fit(read_plan(config_file(max_train_steps=1, lr_warmup_steps=5)), Screen(quiet=True))
    with pytest.raises(UserError, match="the adapter does nothing"):
        push(tmp_path / "run", Screen(quiet=True))


def test_a_token_in_the_config_is_refused_without_being_shown(config_file):
    with pytest.raises(UserError, match=r"hub_token: unknown key\n.*hf auth login") as caught:
        read_plan(config_file(hub_token="hf_secret"))
    assert "hf_secret" not in str(caught.value)
