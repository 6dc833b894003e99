"""A config with every default filled in that depends on the family or the checkpoint: a plan holds it, and a run writes it."""

from typing import Literal, TypeVar

from crepatrain.config.alignment_sections import CrepaConfig, LayerSyncConfig
from crepatrain.config.data_section import DataConfig
from crepatrain.config.run_config import RunConfig
from crepatrain.config.sections import DiffusionConfig, LoraConfig, ModelConfig
from crepatrain.specs import Task

_T = TypeVar("_T")


def _filled(value: _T | None) -> _T:
    """A value that is there wherever its section is in use: resolving fills it in, or checking has refused its absence."""
    assert value is not None
    return value


class ResolvedModel(ModelConfig, frozen=True):
    """The model with its task."""

    task: Task


class ResolvedData(DataConfig, frozen=True):
    """The clips with their size and the folder of their cache."""

    height: int
    width: int
    num_frames: int
    fps: float | Literal["keep"]
    cache_dir: str

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.num_frames, self.height, self.width

    def rate(self, own: float) -> float:
        """Frames per second of what is sampled; `own` is the model's rate, for clips that keep theirs."""
        return own if self.fps == "keep" else self.fps


class ResolvedDiffusion(DiffusionConfig, frozen=True):
    """The noise levels with their shift."""

    flow_shift: float


class ResolvedLora(LoraConfig, frozen=True):
    """The adapter. What is filled in stays null where no adapter is trained."""

    @property
    def alpha(self) -> float:
        """lora_alpha, where an adapter is trained."""
        return _filled(self.lora_alpha)

    @property
    def targets(self) -> list[str] | str:
        """lora_targets, where an adapter is trained."""
        return _filled(self.lora_targets)


class ResolvedCrepa(CrepaConfig, frozen=True):
    """CREPA. What is filled in stays null where it is off."""

    @property
    def block(self) -> int:
        """crepa_block_index, where CREPA is on."""
        return _filled(self.crepa_block_index)

    @property
    def teacher_block(self) -> int:
        """crepa_teacher_block_index, where a block is the teacher."""
        return _filled(self.crepa_teacher_block_index)

    @property
    def projector_lr(self) -> float:
        """crepa_projector_lr, where CREPA is on."""
        return _filled(self.crepa_projector_lr)


class ResolvedLayerSync(LayerSyncConfig, frozen=True):
    """LayerSync, whose blocks are known where it is on."""

    @property
    def student_block(self) -> int:
        """layersync_student_block, where LayerSync is on."""
        return _filled(self.layersync_student_block)

    @property
    def teacher_block(self) -> int:
        """layersync_teacher_block, where LayerSync is on."""
        return _filled(self.layersync_teacher_block)


class ResolvedConfig(RunConfig, frozen=True):
    """A whole run with every default filled in."""

    layersync: ResolvedLayerSync
    crepa: ResolvedCrepa
    diffusion: ResolvedDiffusion
    lora: ResolvedLora
    data: ResolvedData
    model: ResolvedModel
