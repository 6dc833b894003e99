"""From the schema of a config to the fields of a form: labels, choices, defaults, and what a text in a field means."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from crepatrain.config.load import option_value
from crepatrain.config.migrations import VERSION_KEY
from crepatrain.config.run_config import KEYS, RunConfig

Kind = Literal["switch", "choice", "choices", "lines", "text"]

# Words of a key that people write otherwise.
_SPELLED = {
    "lr": "learning rate",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "crepa": "CREPA",
    "ema": "EMA",
    "vae": "VAE",
    "i2v": "image-to-video",
    "adam": "Adam",
    "wan": "Wan",
    "dtype": "data type",
    "dir": "folder",
    "eval": "held-out",
    "fps": "frames per second",
}
# Stands for null among the choices of a field.
UNSET = "null"


@dataclass(frozen=True)
class Field:
    """One key of a config, as a form shows it.

    Attributes:
        kind: switch: on or off; choice: one of `choices`; choices: several of them; lines: a list, an entry a line; text: what
            the command line takes for the key.
        choices: what each value is shown as.
        default: None where there is none, too.
        range: the smallest and largest value in words; empty where every value is possible.
    """

    key: str
    label: str
    description: str
    kind: Kind
    choices: Mapping[Any, str]
    default: Any
    required: bool
    range: str

    def shown(self, value: Any) -> str:
        """The text of a value in the field; `value_of` reads it back."""
        if value is None:
            return ""
        if self.kind == "lines":
            return "\n".join(map(str, value))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def value_of(self, text: str) -> Any:
        """What a text in the field means: the same as after `--key` on the command line."""
        if self.kind == "lines":
            return [line.strip() for line in text.splitlines() if line.strip()]
        return option_value(self.key, text)


@cache
def fields() -> Mapping[str, Field]:
    """The field of every key."""
    schema = RunConfig.model_json_schema()
    return {key: _field(key, described, schema["required"]) for key, described in schema["properties"].items() if key in KEYS}


def _field(key: str, described: Mapping[str, Any], required: Sequence[str]) -> Field:
    branches = described.get("anyOf", [described])
    types = {branch.get("type") for branch in branches}
    choices = _choices(branches)
    kind: Kind = "text"
    if types == {"boolean"}:
        kind = "switch"
    elif choices:
        kind = "choice"
    elif "array" in types and types <= {"array", "null"}:
        items = next(branch for branch in branches if branch.get("type") == "array")["items"]
        kind, choices = ("choices", _as_labels(items["enum"])) if "enum" in items else ("lines", {})
    return Field(
        key,
        KEYS[key].field.title or _label(key),
        described["description"],
        kind,
        choices,
        described.get("default"),
        key in required,
        "; ".join(filter(None, map(_range, branches))),
    )


def _choices(branches: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """Every value that there is; nothing where a branch takes others than are listed."""
    found: dict[Any, str] = {}
    for branch in branches:
        if "enum" in branch:
            found |= _as_labels(branch["enum"])
        elif "const" in branch:
            found[branch["const"]] = str(branch["const"])
        elif branch.get("type") == "boolean":
            found |= {True: "true", False: "false"}
        elif branch.get("type") == "null":
            found[UNSET] = "as the checkpoint or family has it"
        else:
            return {}
    return found


def _as_labels(values: Sequence[str]) -> dict[Any, str]:
    return {value: value for value in values}


def _range(branch: Mapping[str, Any]) -> str:
    low, above = branch.get("minimum"), branch.get("exclusiveMinimum")
    high, below = branch.get("maximum"), branch.get("exclusiveMaximum")
    begin = f"{low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    end = f"{high:.10g}" if high is not None else f"below {below:.10g}" if below is not None else ""
    if begin and end:
        return f"{begin} to {end}"
    return begin if above is not None else begin and f"{begin} or more"


def _label(key: str) -> str:
    """The words of a key, as a heading has them."""
    text = " ".join(_SPELLED.get(word, word) for word in key.removeprefix("crepa_").split("_"))
    text = re.sub("^num ", "number of ", text)
    return text[0].upper() + text[1:]


def off_default(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of the config of a run somebody has chosen, for a run that begins from it."""
    known = fields()
    return {
        key: value for key, value in values.items() if key != VERSION_KEY and not (key in known and value == known[key].default)
    }
