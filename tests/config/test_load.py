"""From files and options to values: what is read, who wins, and every problem at once."""

import json
from pathlib import Path

import pytest

from crepatrain.config.foreign_keys import FOREIGN_KEYS
from crepatrain.config.load import parse, parse_options, read_values, unknown_key
from crepatrain.config.run_config import KEYS, RunConfig
from crepatrain.errors import Problem, UserError

REQUIRED = {"model_family": "wan", "pretrained_model_name_or_path": "checkpoint", "train_data": "clips", "output_dir": "run"}


def options(*words: str) -> dict:
    problems: list[Problem] = []
    values = parse_options(words, problems)
    assert not problems
    return values


def parsed(**values) -> tuple[RunConfig | None, list[str]]:
    problems: list[Problem] = []
    config, _ = parse(REQUIRED | values, problems)
    return config, [str(problem) for problem in problems]


def read(path: Path, text: str, *words: str) -> dict:
    path.write_text(text, encoding="utf-8")
    problems: list[Problem] = []
    values = read_values(path, words, problems)
    assert not problems
    return values


def refused(path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path, text)
    return str(caught.value)


# Files


def test_json_and_yaml_say_the_same(tmp_path):
    values = REQUIRED | {"num_frames": 9, "crepa_enabled": True, "lora_targets": ["to_q"], "revision": None}
    from_json = read(tmp_path / "config.json", json.dumps(values))
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    for name in ("config.yaml", "config.yml", "config.YAML"):
        assert read(tmp_path / name, "\n".join(lines)) == from_json == values


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1.e-4", "0.0001", "+1e-4"])
def test_a_number_in_yaml_is_a_number_however_it_is_written(tmp_path, text):
    values = read(tmp_path / "config.yaml", f"learning_rate: {text}")
    assert values == {"learning_rate": 1e-4}
    config, problems = parsed(**values)
    assert not problems
    assert config is not None
    assert config.optim.learning_rate == 1e-4


def test_a_text_in_yaml_stays_a_text(tmp_path):
    assert read(tmp_path / "config.yaml", "output_name: 'on'\ncrepa_encoder_image_size: grid\nmixed_precision: 'no'") == {
        "output_name": "on",
        "crepa_encoder_image_size": "grid",
        "mixed_precision": "no",
    }


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_the_schema_of_an_editor_is_no_key(tmp_path, name):
    assert read(tmp_path / name, '{"$schema": "crepatrain.schema.json", "seed": 3}') == {"seed": 3}


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    # Windows' PowerShell and Notepad write it.
    assert read(tmp_path / "config.json", '\ufeff{"seed": 3}') == {"seed": 3}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{\n  "seed": 1,\n}', ["line 3", "not valid JSON", "comma"]),
        ("config.json", '{"seed": 1 "fps": 2}', ["line 1", "column 12", "not valid JSON"]),
        ("config.json", "", ["not valid JSON"]),
        ("config.json", "[1, 2]", ["list", "one object"]),
        ("config.json", '"text"', ["str", "one object"]),
        ("config.yaml", "seed: [1", ["not valid YAML", "line 1"]),
        ("config.yaml", "- seed", ["list", "one object"]),
        ("config.yaml", "", ["one object"]),
        ("config.yaml", "seed: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("config.yaml", "? [seed]\n: 1\n", ["not valid YAML", "keys are plain", "line 1"]),
        ("config.yaml", "seed: 1\nrun: !!map [1]\n", ["not valid YAML", "line 2"]),
        ("config.yaml", "seed: 2024-13-45", ["can't be read", "plain values"]),
        ("config.yaml", "seed: " + 5000 * "[", ["can't be read", "plain values"]),
        ("config.json", 100_000 * "[", ["can't be read", "plain values"]),
        ("config.json", '{"seed": ' + 5000 * "1" + "}", ["can't be read", "plain values"]),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, text, words):
    message = refused(tmp_path / name, text)
    assert str(tmp_path / name) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("name", "text"), [("config.json", '{"seed": 1, "seed": 2}'), ("config.yaml", "seed: 1\nseed: 2\n")])
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text):
    message = refused(tmp_path / name, text)
    assert "seed" in message
    assert "twice" in message
    assert "keep one" in message


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_a_bug_in_reading_is_not_blamed_on_the_file(tmp_path, monkeypatch, name):
    def broken(_pairs):
        raise TypeError("ours")

    monkeypatch.setattr("crepatrain.config.load._no_repeats", broken)
    with pytest.raises(TypeError, match="ours"):
        read(tmp_path / name, '{"seed": 1}')


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"(?s)config\.json is not text.*UTF-8"):
        read_values(path, (), [])


def test_a_missing_file_is_answered_with_the_one_that_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)confg\.json does not exist.*did you mean .*config\.json"):
        read_values(tmp_path / "confg.json", (), [])
    with pytest.raises(UserError, match=r"(?s)does not exist.*there are config\.json"):
        read_values(tmp_path / "something-else.yaml", (), [])
    with pytest.raises(UserError, match=r"(?s)does not exist.*configs/"):
        read_values(tmp_path / "nowhere" / "config.json", (), [])
    with pytest.raises(UserError, match=r"is a folder"):
        read_values(tmp_path, (), [])


# Options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--crepa_lambda", "0.3"], {"crepa_lambda": 0.3}),
        (["--crepa-lambda=0.3"], {"crepa_lambda": 0.3}),
        (["--crepa-lambda", "3e-1"], {"crepa_lambda": 0.3}),
        (["--logit-mean", "-1"], {"logit_mean": -1}),
        (["--crepa_enabled"], {"crepa_enabled": True}),
        (["--crepa-enabled", "--num-frames", "9"], {"crepa_enabled": True, "num_frames": 9}),
        (["--crepa_enabled", "false"], {"crepa_enabled": False}),
        (["--crepa_enabled=False"], {"crepa_enabled": False}),
        (["--crepa_similarity_threshold", "null"], {"crepa_similarity_threshold": None}),
        (["--resume_from_checkpoint=none"], {"resume_from_checkpoint": None}),
        (["--crepa_encoder_image_size", "grid"], {"crepa_encoder_image_size": "grid"}),
        (["--crepa_encoder_image_size", "224"], {"crepa_encoder_image_size": 224}),
        (["--lora_targets", "to_q,to_k"], {"lora_targets": ["to_q", "to_k"]}),
        (["--lora_targets", '["to_q", "to_k"]'], {"lora_targets": ["to_q", "to_k"]}),
        (["--lora_targets", "all-linear"], {"lora_targets": "all-linear"}),
        (["--lora_targets", "to_q, ffn.net.0.proj"], {"lora_targets": ["to_q", "ffn.net.0.proj"]}),
        (["--lora_targets", "attn1.to_out.0"], {"lora_targets": ["attn1.to_out.0"]}),
        (["--lora_targets", r"blocks\..*to_q"], {"lora_targets": r"blocks\..*to_q"}),
        (["--lora_targets", ".*(to_q|to_k)"], {"lora_targets": ".*(to_q|to_k)"}),
        (["--lora_targets", r"blocks\.(3,4)"], {"lora_targets": r"blocks\.(3,4)"}),
        (["--lora-use-rslora"], {"lora_use_rslora": True}),
        (["--task", "i2v", "--i2v-dropout=0.1"], {"task": "i2v", "i2v_dropout": 0.1}),
        (["--wan_expert", "low"], {"wan_expert": "low"}),
        (["--wan_expert", "null"], {"wan_expert": None}),
        (["--model_type", "full"], {"model_type": "full"}),
        (["--mixed_precision", "no"], {"mixed_precision": "no"}),
        (["--output_name", "123"], {"output_name": "123"}),
        (["--revision", "1e5"], {"revision": "1e5"}),
        (["--output-dir=runs/a=b"], {"output_dir": "runs/a=b"}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_options_are_read_as_the_key_means_them(words, expected):
    values = options(*words)
    assert values == expected
    config, problems = parsed(**values)
    assert not problems
    assert config is not None
    assert {key: config.value(key) for key in expected} == expected


def test_one_name_is_a_list_of_one():
    config, problems = parsed(**options("--lora_targets", "to_q"))
    assert not problems
    assert config is not None
    assert config.lora.lora_targets == ["to_q"]


@pytest.mark.parametrize("word", ["stray", "-x", "--", "crepa_lambda=0.3"])
def test_what_is_no_option_is_a_problem(word):
    problems: list[Problem] = []
    assert parse_options(["--seed", "3", word], problems) == {"seed": 3}
    assert [problem.what for problem in problems] == [f"{word!r} is not an option"]
    assert "--key value" in problems[0].fix


def test_an_option_wins_over_the_file(tmp_path):
    text = json.dumps({"crepa_lambda": 0.5, "seed": 1})
    assert read(tmp_path / "config.json", text, "--crepa-lambda=0.3") == {"crepa_lambda": 0.3, "seed": 1}


# Keys


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("crepa_lamda", "crepa_lambda"),
        ("crepa_adjacent_distnace", "crepa_adjacent_distance"),
        ("crepa-lambda", "crepa_lambda"),
        ("CREPA_LAMBDA", "crepa_lambda"),
        ("crepa_sheduler", "crepa_scheduler"),
        ("num_frame", "num_frames"),
        ("learning_rat", "learning_rate"),
        ("train_dta", "train_data"),
        ("outputdir", "output_dir"),
        ("lora_ranks", "lora_rank"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_one_meant(key, ours):
    problem = unknown_key(key)
    assert problem.what == f"{key}: unknown key"
    assert problem.fix == f"did you mean {ours}?"


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        # SimpleTuner
        ("model_flavour", "pretrained_model_name_or_path"),
        ("data_backend_config", "train_data"),
        ("flow_schedule_shift", "flow_shift"),
        ("lora_type", "model_type"),
        ("caption_dropout_probability", "caption_dropout"),
        # musubi-tuner
        ("dit", "pretrained_model_name_or_path"),
        ("dataset_config", "train_data"),
        ("network_dim", "lora_rank"),
        ("network_alpha", "lora_alpha"),
        ("discrete_flow_shift", "flow_shift"),
        ("optimizer_type", "optimizer"),
        ("max_train_epochs", "num_train_epochs"),
        ("save_every_n_steps", "checkpointing_steps"),
        # diffusers' scripts and finetrainers
        ("rank", "lora_rank"),
        ("instance_data_root", "train_data"),
        ("train_steps", "max_train_steps"),
        ("batch_size", "train_batch_size"),
        ("model_name", "model_family"),
        ("target_modules", "lora_targets"),
        ("blocks_to_swap", "block_offload"),
        ("ramtorch", "block_offload"),
        ("gradient_checkpointing_cpu_offload", "checkpoint_offload"),
        ("enable_activation_offloading", "checkpoint_offload"),
        ("activation_checkpointing", "gradient_checkpointing"),
        ("fp8_t5", "text_encoder_quantization"),
        ("text_encoder_1_precision", "text_encoder_quantization"),
        ("vae_enable_tiling", "vae_tiling"),
        # however it is spelt
        ("--network-dim", "lora_rank"),
        ("Rank", "lora_rank"),
    ],
)
def test_other_trainers_keys_are_answered_with_ours(key, ours):
    assert unknown_key(key) == Problem(f"{key}: unknown key", f"here it is called {ours}", (key,))


def test_every_foreign_key_leads_to_a_key_of_ours_and_is_none_itself():
    assert set(FOREIGN_KEYS.values()) <= KEYS.keys()
    assert not FOREIGN_KEYS.keys() & KEYS.keys()
    assert all(key == key.lower().replace("-", "_").lstrip("_") for key in FOREIGN_KEYS), "the lookup would never find it"


def test_a_key_that_is_like_nothing_is_answered_with_the_list():
    assert "--schema" in unknown_key("quux").fix


def test_keys_of_options_are_checked_as_those_of_files():
    _, problems = parsed(**options("--crepa-lamda=0.3", "--network_dim", "4"))
    assert problems == [
        "crepa_lamda: unknown key\n  -> did you mean crepa_lambda?",
        "network_dim: unknown key\n  -> here it is called lora_rank",
    ]


# Values


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("num_frames", "9", "whole number"),
        ("num_frames", 9.5, "whole number"),
        ("num_frames", 81.0, "whole number"),
        ("num_frames", True, "whole number"),
        ("num_frames", 0, "use 1 or more"),
        ("height", 8, "use 16 or more"),
        ("width", 10_000, "use 4096 or less"),
        ("fps", 0, "above 0"),
        ("learning_rate", "1e-4", "number"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", float("nan"), "finite"),
        ("crepa_lambda", -0.1, "use 0"),
        ("crepa_lambda", float("inf"), "finite"),
        ("crepa_adjacent_tau", 0, "above 0"),
        ("crepa_adjacent_distance", -1, "use 0 or more"),
        ("crepa_similarity_ema_decay", 1, "below 1"),
        ("crepa_similarity_threshold", "0.9", "number"),
        ("crepa_probe_interval", 0, "use 1 or more"),
        ("crepa_power", 0, "above 0"),
        ("crepa_enabled", "true", "true or false"),
        ("crepa_enabled", 1, "true or false"),
        ("crepa_enabled", None, "true or false"),
        ("crepa_scheduler", "cosin", "did you mean cosine?"),
        ("crepa_scheduler", "Cosine", "did you mean cosine?"),
        ("crepa_scheduler", "exponential", "use one of: constant, linear, cosine, polynomial"),
        ("crepa_threshold_mode", "recover", "did you mean recoverable?"),
        ("crepa_feature_source", "pixel", "did you mean pixels?"),
        ("crepa_projector", "mlp", "use one of: linear, conv"),
        ("crepa_encoder_image_size", "grd", "did you mean grid?"),
        ("crepa_encoder_image_size", 10, "use 14 or more"),
        ("crepa_encoder", "", "write a value"),
        ("optimizer", "adam", "did you mean adamw?"),
        ("lr_scheduler", "cosin", "did you mean cosine?"),
        ("timestep_sampling", "logitnormal", "did you mean logit_normal?"),
        ("missing_captions", "ignore", "use one of: error, empty, filename, skip"),
        ("mixed_precision", "fp16", "no, bf16"),
        ("model_type", "fll", "did you mean full?"),
        ("model_family", "wann", "did you mean wan?"),
        ("model_family", 3, "text"),
        ("train_data", None, "text"),
        ("train_data", "", "write a value"),
        ("output_name", "../up", "letters, digits"),
        ("lora_targets", 3, "list"),
        ("lora_targets", [], "list"),
        ("lora_targets", "blocks.(", "list of names, or correct it"),
        ("lora_use_rslora", 1, "true or false"),
        ("task", "v2v", "did you mean"),
        ("task", "text", "t2v, i2v"),
        ("wan_expert", "hihg", "did you mean high?"),
        ("i2v_dropout", 1.5, "use 1"),
        ("lora_rank", 0, "use 1 or more"),
        ("lora_alpha", 0, "above 0"),
        ("revision", 1, "text"),
        ("seed", -1, "use 0 or more"),
        ("caption_dropout", 1.5, "use 1"),
    ],
)
def test_a_wrong_value_is_reported_with_key_value_and_remedy(key, value, remedy):
    _, problems = parsed(**{key: value})
    assert len(problems) == 1
    what, _, fix = problems[0].partition("\n  -> ")
    assert what.startswith(f"{key}={json.dumps(value)}")
    assert remedy in fix


@pytest.mark.parametrize(("targets", "shown"), [([""], '""'), (["to_q", 3], "3"), ([["to_q"]], '["to_q"]')])
def test_a_wrong_name_in_a_list_is_reported(targets, shown):
    _, problems = parsed(lora_targets=targets)
    assert len(problems) == 1
    assert problems[0].startswith(f"lora_targets={shown}: ")


def test_a_whole_number_is_a_number():
    config, problems = parsed(learning_rate=1, fps=16)
    assert not problems
    assert config is not None
    assert (config.optim.learning_rate, config.data.fps) == (1.0, 16.0)


def test_a_missing_key_is_reported_with_its_meaning():
    problems: list[Problem] = []
    _, wrong = parse({}, problems)
    assert wrong == set(REQUIRED)
    assert {problem.what for problem in problems} == {f"{key} is missing" for key in REQUIRED}
    assert all(KEYS[key].field.description in str(problems) for key in REQUIRED)


def test_every_problem_of_a_file_at_once():
    config, problems = parsed(rank=4, crepa_lamda=0.1, seed="1", crepa_scheduler="cosin", learning_rate=-1, fps=25)
    assert len(problems) == 5
    for key in ("rank", "crepa_lamda", "seed", "crepa_scheduler", "learning_rate"):
        assert sum(problem.startswith((f"{key}:", f"{key}=")) for problem in problems) == 1
    assert config is not None, "what could be understood goes on to be checked"
    assert (config.data.fps, config.loop.seed) == (25, KEYS["seed"].field.default)


def test_a_yaml_file_may_merge_mappings(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {seed: 1, fps: 24}\nrun:\n  <<: *base\n  seed: 2\n", encoding="utf-8")
    assert read_values(path, (), [])["run"] == {"seed": 2, "fps": 24}
