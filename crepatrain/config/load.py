"""From a config file and command-line options to a RunConfig, or to every problem in them at once."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from crepatrain.config.foreign_keys import FOREIGN_KEYS
from crepatrain.config.migrations import migrate
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.run_config import KEYS, RunConfig, unknown_keys
from crepatrain.errors import Problem, UserError, closest
from crepatrain.specs import FAMILIES

_SECRETS = {"hub_token", "hf_token", "huggingface_token", "token", "use_auth_token"}

# Stand in for required keys that are missing or wrong, so that the others can still be checked against each other.
_STAND_INS: Mapping[str, Any] = {
    "model_family": next(iter(FAMILIES)),
    "pretrained_model_name_or_path": "unknown",
    "train_data": ".",
    "output_dir": "output",
}


# Signs that the name of a layer never has.
_REGEX_SIGNS = re.compile(r"[\\*+?|()\[\]{}^$]")


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as everybody who writes it means it, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping whose keys are plain", node.start_mark)
        own = [(key, value) for key, value in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _no_repeats([(self.construct_object(key, deep=True), self.construct_object(value, deep=True)) for key, value in own])
        return super().construct_mapping(node, deep=deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_values(path: Path, options: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """The plain values of a JSON or YAML file of any version, and of `--key value` options, which win.

    Args:
        problems: options that can't be read are added to it.

    Raises:
        UserError: the file can't be read, or is of a newer version.
    """
    values = migrate(_read_file(path), f"config {path}")
    values.update(parse_options(options, problems))
    return values


def parse(values: Mapping[str, Any], problems: list[Problem]) -> tuple[RunConfig, frozenset[str]]:
    """A config of what can be understood, so that it can be checked further, and the keys that could not.

    Args:
        problems: everything that is wrong with the values is added to it.

    Returns:
        The config, in which defaults or stand-ins take the place of what is wrong or missing; and the keys where they do.
    """
    known = {key: value for key, value in values.items() if key in KEYS}
    problems += [unknown_key(key) for key in values if key not in known]
    try:
        return RunConfig.model_validate(known), frozenset()
    except ValidationError as error:
        problems += _explain(error)
        wrong = frozenset(map(_key_of, error.errors()))
    rest = {key: value for key, value in known.items() if key not in wrong}
    return RunConfig.model_validate({key: value for key, value in _STAND_INS.items() if key in wrong} | rest), wrong


def read_run_config(values: object, file: object) -> tuple[ResolvedConfig, tuple[str, ...]]:
    """The config of a run, from what its config.json holds, which another version may have written.

    Args:
        values: the object of keys that was read from the file.
        file: what messages call the file.

    Returns:
        The config, and the names of keys that this version does not know, which are left out of it.

    Raises:
        UserError: it is of a newer version, or a value of it is missing or wrong.
    """
    fix = "give the folder of a run, its output_dir"
    if not isinstance(values, Mapping):
        raise UserError(f"{file} can't be read (it holds a {type(values).__name__})", fix)
    migrated = migrate(values, file)
    known = {key: value for key, value in migrated.items() if key in KEYS}
    try:
        RunConfig.model_validate(known)  # a ResolvedConfig narrows the types of some keys, and leaves their ranges to it
        config = ResolvedConfig.model_validate(known)
    except ValidationError as error:
        problems = _explain(error)
        keys = tuple(key for problem in problems for key in problem.keys)
        raise UserError(f"{file} can't be read ({'; '.join(problem.what for problem in problems)})", fix, keys) from error
    return config, tuple(unknown_keys(migrated))


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"config {path} is a folder", "give a .json or .yaml file, such as its config.json")
    if path.suffix.lower() not in {".json", ".yaml", ".yml"}:
        raise UserError(f"config {path} is neither JSON nor YAML by its name", "give a .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist", _other_configs(path)) from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not text", "give a .json or .yaml file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config {path} can't be read: {error}", "correct its name or its permissions") from None
    try:
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_no_repeats)
        else:
            values = yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a SafeLoader, made stricter
    except json.JSONDecodeError as error:
        raise UserError(
            f"config {path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})",
            "correct that line (a missing or trailing comma is the usual cause)",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}", "correct that line") from None
    except (RecursionError, ValueError) as error:  # too deep, too long a number, an impossible date
        raise UserError(f"config {path} can't be read: {error}", "write one flat object of keys and plain values") from None
    if values is None:
        raise UserError(f"config {path} is empty", "write one object of keys and values, or start from one in configs/")
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds a {type(values).__name__}", "write one object of keys and values")
    values.pop("$schema", None)  # what editors look for; see `crepatrain validate-config --schema`
    return {str(key): value for key, value in values.items()}


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            what = f"{key} stands twice in the config, as {seen[key]!r} and {value!r}"
            raise UserError(what, "keep one of them", (key,))
        seen[key] = value
    return seen


def _other_configs(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*") if p.suffix in {".json", ".yaml", ".yml"}) if folder.is_dir() else []
    close = closest(path.name, found)
    if close:
        return f"did you mean {folder / close}?"
    return f"there are {', '.join(found[:5])} in {folder}" if found else "start from one in configs/"


def parse_options(options: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """`--key value`, `--key=value` or `--flag` as values, dashes or underscores in the key."""
    values: dict[str, Any] = {}
    rest = list(options)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(Problem(f"{word!r} is not an option", "write --key value, after the config file"))
            continue
        name, given, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if not given and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not given and _is_switch(key):
            value = "true"
        elif not given:
            problems.append(Problem(f"--{name} has no value", f"write --{name} VALUE", (key,)))
            continue
        values[key] = option_value(key, value)
    return values


def _is_switch(key: str) -> bool:
    return key in KEYS and _plain_types(KEYS[key].field.annotation) == {bool}


def option_value(key: str, text: str) -> Any:
    """The value that a text means which was written for a key: of an option, or in a field of a form."""
    annotation = KEYS[key].field.annotation if key in KEYS else None
    if text.lower() in {"null", "none"}:
        return None
    types = _plain_types(annotation)
    if types == {str} or (dict in types and not text.startswith("[")):
        return text
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        pass
    else:
        return [value] if isinstance(value, int) and _lists_numbers(annotation) and int not in types else value
    is_list = list in types and text not in _choices(annotation)
    if not is_list or _REGEX_SIGNS.search(text):
        return text
    items = [name.strip() for name in text.split(",")]
    return [int(item) if item.isdecimal() else item for item in items] if _lists_numbers(annotation) else items


def _plain_types(annotation: Any) -> set[type]:
    if annotation is None or annotation is type(None):
        return set()
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if origin is list:
        return {list} if dict not in _plain_types(get_args(annotation)[0]) else {dict}
    if origin is dict:
        return {dict}
    if isinstance(annotation, type):
        return {annotation}
    return set().union(*(_plain_types(arg) for arg in get_args(annotation)))


def _lists_numbers(annotation: Any) -> bool:
    if get_origin(annotation) is list:
        return _plain_types(get_args(annotation)[0]) == {int}
    return any(map(_lists_numbers, get_args(annotation)))


def _choices(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) is list:  # a choice of its entries is none of the value
        return set()
    return set().union(*(_choices(arg) for arg in get_args(annotation)))


def options_of_released_model(model: str | None) -> list[str]:
    """Options that replace the config's model by a released one; none for None.

    Raises:
        UserError: no released model has that name.
    """
    if model is None:
        return []
    known = {name: spec for spec in FAMILIES.values() for name in spec.released}
    if model not in known:
        close = closest(model, known)
        raise UserError(
            f"--assume-model {model}: unknown", f"did you mean {close}?" if close else f"use one of {', '.join(known)}"
        )
    spec = known[model]
    expert = spec.variant(spec.released[model].checkpoint, None).expert
    options = ["--model_family", spec.name, "--pretrained_model_name_or_path", str(spec.released[model].repo)]
    return options + (["--wan_expert", expert] if expert else [])


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> tuple[Any, ...]:
    """Finite numbers, separated by commas.

    Raises:
        UserError: something else.
    """
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        example = "500,1000" if kind is int else "0.7,1.0"
        raise UserError(f"{option} {text}: not numbers separated by commas", f"write {option} {example}")
    return numbers


def unknown_key(key: str) -> Problem:
    """What to answer to a key that is not ours."""
    lowered = key.lower().replace("-", "_").lstrip("_")
    if lowered in _SECRETS:
        fix = "leave it out, as a config is copied into the run's folder: run `hf auth login`, or set HF_TOKEN"
    elif lowered in FOREIGN_KEYS:
        fix = f"here it is called {FOREIGN_KEYS[lowered]}"
    elif close := closest(lowered, KEYS, cutoff=0.7):
        fix = f"did you mean {close}?"
    else:
        fix = "remove it; `crepatrain validate-config --schema` lists every key"
    return Problem(f"{key}: unknown key", fix, (key,))


# Of pydantic's error types: what is wrong, and the remedy.
_WRONG: Mapping[str, tuple[str, str]] = {
    "greater_than": ("out of range", "use a value above {gt}"),
    "greater_than_equal": ("out of range", "use {ge} or more"),
    "less_than": ("out of range", "use a value below {lt}"),
    "less_than_equal": ("out of range", "use {le} or less"),
    "finite_number": ("out of range", "write a finite number"),
    "int_type": ("wrong type", "write a whole number"),
    "int_from_float": ("wrong type", "write a whole number"),
    "float_type": ("wrong type", "write a number"),
    "bool_type": ("wrong type", "write true or false"),
    "string_type": ("wrong type", 'write a text in "quotes"'),
    "list_type": ("wrong type", "write a list"),
    "too_short": ("an empty list", "write a list of one entry or more, or leave the key out"),
    "string_too_short": ("empty", "write a value"),
    "string_too_long": ("too long", "use {max_length} characters or fewer"),
    "string_pattern_mismatch": ("not a possible name", "use letters, digits, dot, dash and underscore"),
    "impossible_regex": ("not a regular expression", "write a list of names, or correct it"),
    "impossible_path": ("not a possible path", "give a shorter path"),
}


def _explain(error: ValidationError) -> list[Problem]:
    """One problem per key, whatever branches of a union failed under it."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_key.setdefault(_key_of(details), []).append(details)
    return [_explain_key(key, found) for key, found in by_key.items()]


def _key_of(details: ErrorDetails) -> str:
    _section, key, *_ = details["loc"]
    return str(key)


def _explain_key(key: str, found: list[ErrorDetails]) -> Problem:
    if found[0]["type"] == "missing":
        return Problem(f"{key} is missing", f"add it. {KEYS[key].field.description}", (key,))
    explained = [_reason_and_remedy(details) for details in found]
    reason = explained[0][0] if len({reason for reason, _ in explained}) == 1 else "not possible here"
    value = json.dumps(found[0]["input"], default=str)
    remedies = ", or ".join(dict.fromkeys(remedy for _, remedy in explained))
    return Problem(f"{key}={value}: {reason}", remedies, (key,))


def _reason_and_remedy(details: ErrorDetails) -> tuple[str, str]:
    context = details.get("ctx", {})
    if details["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = closest(str(details["input"]).lower(), choices)
        listed = f"one of: {', '.join(choices)}" if len(choices) > 1 else f'"{choices[0]}"'
        return "unknown", f"did you mean {close}? Use {listed}" if close else f"use {listed}"
    reason, remedy = _WRONG.get(details["type"], ("not possible here", details["msg"]))
    numbers = {name: f"{value:g}" for name, value in context.items() if isinstance(value, (int, float))}
    return reason, remedy.format(**numbers)
