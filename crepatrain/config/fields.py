"""What a section of the config is, and values that a key may have beyond plain numbers and texts."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from crepatrain.specs import FAMILIES


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise PydanticCustomError("literal_error", "unknown family", {"expected": ", ".join(map(repr, FAMILIES))})
    return name


FamilyName = Annotated[str, AfterValidator(_known_family), WithJsonSchema({"type": "string", "enum": list(FAMILIES)})]


def _possible_path(text: str) -> str:
    """A path that the system can take, with ~ expanded."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - a hub id is no path, and stays as it is
    if "\0" in expanded or len(expanded) > 4000 or any(len(os.fsencode(part)) > 255 for part in expanded.split("/")):
        raise PydanticCustomError("impossible_path", "no system has such a path")
    return expanded


Quantization = Annotated[Literal["none", "int8", "fp8", "nf4"], BeforeValidator(lambda value: "none" if value is None else value)]
"""How the frozen base is kept."""

ClipMode = Literal["chunks", "first", "middle", "uniform", "slide", "random"]
"""Which windows a clip is cut into."""

Size = Annotated[list[Annotated[int, Field(ge=16, le=4096)]], Field(min_length=2, max_length=2)]
"""[height, width] in pixels."""

TextQuantization = Annotated[Literal["none", "int8", "nf4"], BeforeValidator(lambda value: "none" if value is None else value)]
"""How text encoders are kept."""

PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible_path)]


def _possible_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise PydanticCustomError("impossible_regex", "{reason}", {"reason": str(error)}) from error
    return text


LoraTargets = (
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    | Literal["all-linear"]
    | Annotated[str, Field(min_length=1), AfterValidator(_possible_regex)]
)

# A run may go on after such a key was changed: it alters how the run is watched, how long it is, or where things lie. What lies
# there is compared with the checkpoint's fingerprint.
MAY_CHANGE: dict[str, Any] = {"may_change": True}

# A run may go on after such a key was changed where allow_changes names it: its result is another one, but what a checkpoint
# holds keeps its shapes and its meaning.
IF_ALLOWED: dict[str, Any] = {"if_allowed": True}

# The longest names in a run's folder begin with output_name, and a file system takes 255 bytes.
LONGEST_OUTPUT_NAME = 150


class Section(BaseModel, frozen=True):
    """One part of the config: unknown keys are errors, values are taken as they are written, never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
