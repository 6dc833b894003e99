"""What `memory: auto` and `block_offload: auto` choose: of the settings that fit a card, those that cost the least time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crepatrain.config.memory_checks import MEMORY_KEYS, check_checkpointing, check_offload, check_quantization
from crepatrain.config.plan import Plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.memory.estimate import keys_in_words
from crepatrain.memory.offload import BlockSizes, inputs_on_host
from crepatrain.memory.stages import GIB, Stage, sampling_stage, training_stage
from crepatrain.placement.ring import BUFFERS
from crepatrain.screen import Screen

# From the least time to the most: what each rung sets beside those before it. `block_offload` is whether weights may be in host
# memory, of as few blocks as possible: they are copied beside the work, as the blocks' inputs are with `checkpoint_offload`.
# Quantisation comes last, as it alone changes numbers: it halves the host memory of the blocks, for machines with too little.
_USUAL: Mapping[str, Any] = {
    "gradient_checkpointing": True,
    "block_offload": True,
    "checkpoint_offload": False,
    "nested_checkpointing": False,
    "base_quantization": "none",
}
_LADDER: Sequence[Mapping[str, Any]] = (
    _USUAL | {"gradient_checkpointing": False, "block_offload": False},
    _USUAL | {"gradient_checkpointing": "selective", "block_offload": False},
    _USUAL | {"block_offload": False},
    _USUAL | {"gradient_checkpointing": "selective"},
    _USUAL,
    _USUAL | {"checkpoint_offload": True},
    _USUAL | {"checkpoint_offload": True, "nested_checkpointing": True},
    _USUAL | {"base_quantization": "int8"},
    _USUAL | {"base_quantization": "int8", "checkpoint_offload": True},
    _USUAL | {"base_quantization": "int8", "checkpoint_offload": True, "nested_checkpointing": True},
)
# What a setting costs; what is not here costs nothing, and is not spoken of.
_COSTS: Mapping[tuple[str, Any], str] = {
    ("gradient_checkpointing", False): "nothing is computed twice",
    ("gradient_checkpointing", "selective"): "the blocks are computed again in the backward pass, but for self-attention",
    ("gradient_checkpointing", True): "the blocks are computed again in the backward pass, which is a third more work",
    ("nested_checkpointing", True): "the parts of the blocks are computed once more, which is another third",
    ("base_quantization", "int8"): "gradients with an error of 0.1 to 0.3 %",
}


@dataclass(frozen=True)
class Choice:
    """Settings for a card.

    Attributes:
        values: of the keys that were open.
        peak: bytes of the GPU, by the estimate.
        on_host: bytes of host memory that each process pins.
        copied: bytes of weights that are copied to the GPU in an optimizer step.
        inputs: bytes of the blocks' inputs that go to host memory and come back in one.
        fits: whether that is no more than there is; if not, these are the settings that need least.
        not_enough: cheaper settings, with the bytes that they need.
    """

    values: Mapping[str, Any]
    peak: int
    on_host: int
    copied: int
    inputs: int
    fits: bool
    not_enough: Sequence[tuple[Mapping[str, Any], int]]

    def rows(self) -> list[tuple[str, str]]:
        """The settings, each with what it costs, and what was not enough; for people."""
        costs = {
            **_COSTS,
            ("checkpoint_offload", True): f"{_gib(self.inputs)} to host memory and back in a step, beside the work",
        }
        blocks = self.values.get("block_offload", 0)
        if blocks:
            costs["block_offload", blocks] = f"{_gib(self.copied)} copied to the GPU in a step, beside the work"
        rows = [(_words({key: value}), costs[key, value]) for key, value in self.values.items() if (key, value) in costs]
        if self.on_host:
            rows.append(("host memory", f"{_gib(self.on_host)}, pinned"))
        less = [f"{_words(values)}: {_gib(peak)}" for values, peak in self.not_enough]
        return [*rows, *([("not enough", "; ".join(less))] if less else [])]


class Chooser:
    """Finds settings for cards of any size. What it has estimated for one card it knows for the next.

    Args:
        open_keys: that may be chosen; the others stay as the plan has them.
        bucket: the largest clips.
    """

    def __init__(self, plan: Plan, open_keys: frozenset[str], bucket: Bucket) -> None:
        self._plan, self._open, self._bucket = plan, open_keys, bucket
        self._known: dict[str, tuple[list[Stage], BlockSizes]] = {}

    def choose(self, room: int, host: int | None) -> Choice:
        """The first settings that fit.

        Args:
            room: bytes of the GPU that can be used.
            host: bytes of host memory that can be pinned; None: not known, as the card is in another machine.

        Raises:
            UserError: the model's step can't run on fake tensors.
        """
        refused: list[Choice] = []
        short_of_host = False
        for config, offloads in self._settings():
            inputs = inputs_on_host(replace(self._plan, config=config), self._bucket)
            lacks_host = "checkpoint_offload" in self._open and host is not None and inputs > host
            short_of_host |= lacks_host
            if lacks_host or (not offloads and self._needs_more(config, room)):
                continue
            quantises = "base_quantization" in self._open and config.loop.base_quantization != "none"
            if quantises and not short_of_host:
                continue
            stages, sizes = self._estimated(config)
            before = config.loop.block_offload
            assert before != "auto", "it is open, and 0 here"
            numbers: Sequence[int] = [before]
            if offloads:
                # The buffers hold as many blocks as there are of them.
                several = range(BUFFERS + 1, sizes.depth + 1)
                numbers = [n for n in several if host is None or sizes.on_host(n) + inputs <= host] or [0]
                short_of_host |= len(numbers) < len(several)
            peaks = {n: max(sizes.changed(stage, before, n).peak for stage in stages) for n in numbers}
            count = next((n for n in numbers if peaks[n] <= room), numbers[-1])
            values = {key: count if key == "block_offload" else config.value(key) for key in _USUAL if key in self._open}
            steps = config.loop.gradient_accumulation_steps
            choice = Choice(
                values,
                peaks[count],
                sizes.on_host(count) + inputs,
                copied=2 * sizes.moved(count) * steps,
                inputs=2 * inputs * steps,
                fits=peaks[count] <= room,
                not_enough=[(other.values, other.peak) for other in refused],
            )
            if choice.fits:
                return choice
            refused.append(choice)
        least = min(refused, key=lambda choice: choice.peak)
        return replace(least, not_enough=[(other.values, other.peak) for other in refused if other is not least])

    def _needs_more(self, config: ResolvedConfig, room: int) -> bool:
        """Whether it is known at once that these settings don't fit: recomputing all of a block never needs more than they do."""
        least = config.changed(gradient_checkpointing=True)
        known = "gradient_checkpointing" in self._open and least != config
        return known and max(stage.peak for stage in self._estimated(least)[0]) > room

    def _settings(self) -> Iterator[tuple[ResolvedConfig, bool]]:
        """Configs, and whether blocks go to host memory, each once."""
        seen, depth = [], self._plan.geometry.depth
        for rung in _LADDER:
            values = {key: value for key, value in rung.items() if key in self._open and key != "block_offload"}
            config = self._plan.config.changed(**values, **({"block_offload": 0} if "block_offload" in self._open else {}))
            offloads = rung["block_offload"] and "block_offload" in self._open
            offloads = offloads and not check_offload(config.changed(block_offload=1), depth)
            wrong = check_checkpointing(config.loop) + check_offload(config, depth) + check_quantization(config)
            if (values, offloads) not in seen and not wrong:
                seen.append((values, offloads))
                yield config, offloads

    def _estimated(self, config: ResolvedConfig) -> tuple[list[Stage], BlockSizes]:
        name = config.model_dump_json()
        if name not in self._known:
            plan = replace(self._plan, config=config)
            stages = [training_stage(plan, self._bucket)]
            if config.validation.validation_prompts:
                stages.append(sampling_stage(plan, Bucket(*plan.size)))
            self._known[name] = stages, BlockSizes.of(plan)
        return self._known[name]


def choose_memory(plan: Plan, bucket: Bucket, room: int | None, host: int | None, screen: Screen) -> Plan:
    """The plan with a value for every key that was open.

    Args:
        bucket: the largest clips.
        room: bytes of the GPU that can be used; None: there is none.
        host: as for `Chooser.choose`.

    Raises:
        UserError: the model's step can't run on fake tensors, so that nothing is known of it.
    """
    if not plan.open_keys:
        return plan
    asked = "memory: auto" if plan.config.loop.memory == "auto" else "block_offload: auto"
    if room is None:
        screen.note(f"{asked} changes nothing here, as there is no GPU; dry-run --fits 24 chooses for one of 24 GB")
        values = {"block_offload": 0} if "block_offload" in plan.open_keys else {}
        return _settled(plan, values)
    try:
        choice = Chooser(plan, plan.open_keys, bucket).choose(room, host)
    except UserError as error:
        fix = "give block_offload a number" if asked.startswith("block") else "set memory to manual"
        raise UserError(f"{asked}: {error.problems[0].what}", fix, ("memory", "block_offload")) from error
    verdict = (
        f"of {_gib(room)}" if choice.fits else f"which is more than the {_gib(room)} that there are: the rehearsal will tell"
    )
    screen.rows(asked, [*choice.rows(), ("needed", f"{_gib(choice.peak)}, {verdict}")])
    return _settled(plan, choice.values)


def what_would_fit(plan: Plan, bucket: Bucket, room: int) -> Choice:
    """The settings with which a plan fits a card of another machine, whatever was chosen in it."""
    return Chooser(plan, MEMORY_KEYS, bucket).choose(room, None)


def _settled(plan: Plan, values: Mapping[str, Any]) -> Plan:
    return replace(plan, config=plan.config.changed(**values), open_keys=frozenset())


def _words(values: Mapping[str, Any]) -> str:
    """Settings for people, without those that are switched off."""
    return keys_in_words(
        {key: value for key, value in values.items() if value not in (0, "none") or key == "gradient_checkpointing"}
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
