"""Captions and videos on a GPU that is smaller than the model: block by block, by themselves."""

import json
from pathlib import Path

import pytest

CODE = """
import json, sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, {root!r})
from dataclasses import replace
from common import tiny_family
from crepatrain.console import Screen
from crepatrain.families import family_class
from crepatrain.families.random import write_random_pipeline
from crepatrain.placement.inference import weights_bytes
from crepatrain.placement.placing import free_memory
from crepatrain.sampling.comparison import Candidate, Held, TrainedModel, encode_texts, open_pipeline, sample_candidate
from crepatrain.training.text_encoders import TextEncoding
import device as pretend

class Heard(Screen):
    def __init__(self):
        super().__init__(quiet=True)
        self.heard = []
    def say(self, text):
        self.heard.append(text)

tiny = family_class("wan").tiny["tiny"]
folder = Path({folder!r})
write_random_pipeline(
    family_class("wan"), folder, replace(tiny, transformer={{**tiny.transformer, "num_layers": 24, "ffn_dim": 12288}})
)
family = tiny_family()
family.checkpoint = replace(tiny, transformer={{**tiny.transformer, "num_layers": 24, "ffn_dim": 12288}}).checkpoint
model = TrainedModel(family, str(folder), None, {{}}, None)
cuda = torch.device("cuda")
whole = 2 * weights_bytes([family.load_transformer(str(folder), torch.float32)]) // 4

def made(held, total):
    pretend.TOTAL = total
    screen, tried = Heard(), replace(model, held=held)
    free_memory()
    before = device.live
    device.forget_peak()
    arguments = family.pipeline_arguments(family.sample_defaults(5, 64, 96, 16.0) | {{"steps": 2}})
    arguments |= encode_texts(tried, "a square", "grey", cuda, screen)
    pipeline = open_pipeline(tried, cuda, screen)
    frames = sample_candidate(pipeline, tried, Candidate("one", None, 1.0), arguments, 3, lambda: None)
    peak = device.peak - before
    del pipeline, arguments
    free_memory()
    return frames.tolist(), screen.heard, peak

results = [
    made(Held(), 1 << 40),
    made(Held(), whole),
    made(Held(TextEncoding(offload=True), offload=True), 1 << 40),
]
same = [frames == results[0][0] for frames, _, _ in results]
print(json.dumps([same, [heard for _, heard, _ in results], [peak for _, _, peak in results], whole]))
"""


@pytest.mark.slow
def test_a_transformer_that_does_not_fit_makes_the_same_video(inside, tmp_path):
    here = Path(__file__).parents[1]
    said = inside(CODE.format(tests=str(here), root=str(here.parent), folder=str(tmp_path / "base")))
    same, heard, peaks, whole = json.loads(said.splitlines()[-1])
    assert same == [True, True, True]
    assert heard[0] == []
    assert any(line.startswith("the transformer's") for line in heard[1])
    assert any(line.startswith("text_encoder_offload") for line in heard[2])
    assert peaks[0] > whole > 2 * max(peaks[1:])
