"""A whole run, as its config was written.

In code a key stands in its section, such as `config.crepa.crepa_lambda`. Files and `model_dump` hold one flat object of keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from crepatrain.config.alignment_sections import CrepaConfig, LayerSyncConfig
from crepatrain.config.data_section import DataConfig
from crepatrain.config.fields import Section
from crepatrain.config.migrations import CONFIG_VERSION, VERSION_KEY
from crepatrain.config.sections import (
    DiffusionConfig,
    HubConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ValidationConfig,
)


class RunConfig(BaseModel, frozen=True):
    """A whole run, as it was written. Made from, and dumped as, one flat object; its keys are in this order of the sections."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layersync: LayerSyncConfig
    crepa: CrepaConfig
    hub: HubConfig
    validation: ValidationConfig
    loop: LoopConfig
    optim: OptimConfig
    diffusion: DiffusionConfig
    lora: LoraConfig
    data: DataConfig
    model: ModelConfig

    @model_validator(mode="before")
    @classmethod
    def _into_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        unknown = unknown_keys(values)
        if unknown:
            raise PydanticCustomError("extra_forbidden", "unknown keys: {keys}", {"keys": ", ".join(map(str, unknown))})
        return {name: {} for name in cls.model_fields} | _by_section(values)

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for section in handler(self).values() for key, value in section.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The flat object, for editors and forms: every key names its section, and the sections are described beside them."""
        sections = {name: section.model_json_schema() for name, section in SECTIONS.items()}
        properties = {
            "$schema": {"type": "string", "description": "Where editors find this schema."},
            VERSION_KEY: {
                "type": "integer",
                "minimum": 1,
                "maximum": CONFIG_VERSION,
                "description": "Version of the keys, which a run writes into its config.json.",
            },
        }
        for name, section in sections.items():
            properties |= {key: described | {"section": name} for key, described in section["properties"].items()}
        return {
            "title": cls.__name__,
            "description": "A whole run, as one flat object.",
            "type": "object",
            "properties": properties,
            "required": [key for key, info in KEYS.items() if info.field.is_required()],
            "additionalProperties": False,
            "sections": [
                {"name": name, "title": section["title"], "description": section["description"]}
                for name, section in reversed(sections.items())
            ],
        }

    @property
    def explicitly_set(self) -> frozenset[str]:
        """The keys that were written, rather than left at their defaults."""
        return frozenset[str]().union(*(self.section(name).model_fields_set for name in SECTIONS))

    def section(self, name: str) -> Section:
        """The section of that name."""
        return getattr(self, name)

    def value(self, key: str) -> Any:
        """The value of a key, whichever section it is in."""
        return getattr(self.section(KEYS[key].section), key)

    def changed(self, **values: Any) -> Self:
        """A copy with other values for these keys.

        Raises:
            pydantic.ValidationError: a value is out of its range.
        """
        update = {}
        for name, changes in _by_section(values).items():
            section = self.section(name)
            update[name] = type(section).model_validate(section.model_dump(exclude_unset=True) | changes)
        return self.model_copy(update=update)

    def as_file(self) -> dict[str, Any]:
        """What a run's config.json holds: the version of the keys, and every key."""
        return {VERSION_KEY: CONFIG_VERSION, **self.model_dump()}


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key.

    Attributes:
        section: name of the section that it is in.
    """

    section: str
    field: FieldInfo

    @property
    def may_change(self) -> bool:
        """Whether a run may go on after this key was changed."""
        return self._is("may_change")

    @property
    def if_allowed(self) -> bool:
        """Whether a run may go on after this key was changed, where allow_changes names it."""
        return self._is("if_allowed")

    def _is(self, mark: str) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get(mark))


def _section_classes() -> dict[str, type[Section]]:
    found = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        found[name] = field.annotation
    return found


SECTIONS: Mapping[str, type[Section]] = _section_classes()

KEYS: Mapping[str, KeyInfo] = {
    key: KeyInfo(name, field) for name, section in SECTIONS.items() for key, field in section.model_fields.items()
}
assert len(KEYS) == sum(len(section.model_fields) for section in SECTIONS.values()), "a key is in one section"

# What allow_changes may name: a change of one of these leaves the shapes and the meaning of a checkpoint. train_data stands for
# the clips themselves; where they lie may change anyway.
ALLOWABLE: tuple[str, ...] = tuple(sorted({"train_data", *(key for key, info in KEYS.items() if info.if_allowed)}))


def unknown_keys(values: Iterable[str]) -> list[str]:
    """The keys that this version does not know, as another version may have written them."""
    return [key for key in values if key not in KEYS]


def _by_section(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        found.setdefault(KEYS[key].section, {})[key] = value
    return found
