"""Models for tests of how blocks are placed."""

import pytest
from trained_blocks import Model

from crepatrain.config.plan import read_plan


@pytest.fixture
def model(tiny_checkpoint, config_file):
    def made(family="wan", tiny="tiny", queues=None, **changes):
        size = {"height": 128, "width": 192, "num_frames": 17} if family == "ltxvideo" else {}
        more = {"task": "i2v"} if "i2v" in tiny else {}
        more |= {"wan_expert": "low"} if "a14b" in tiny else {}
        folder = str(tiny_checkpoint(family, tiny))
        path = config_file(
            model_family=family,
            pretrained_model_name_or_path=folder,
            crepa_enabled=False,
            crepa_encoder=...,
            crepa_encoder_image_size=...,
            **{"mixed_precision": "bf16"} | size | more | changes,
        )
        return Model(read_plan(path), queues)

    return made
