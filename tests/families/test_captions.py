"""How much of a caption every family's text encoder reads."""

import pytest
import torch
from common import tiny_family

# The tiny tokenizers make a token of every byte. Of the tokens that a caption may have, T5's end and the end of SANA's
# instruction take one and two.
READ = {"wan": 511, "ltxvideo": 127, "sanavideo": 298, "kandinsky5_video": 512}
LETTERS = "abcdefghij" * 60


@pytest.mark.parametrize("name", READ)
def test_a_caption_is_reported_as_cut_exactly_where_it_is(name, tiny_checkpoint):
    family, folder, read = tiny_family(name), str(tiny_checkpoint(name)), READ[name]
    encoder = family.load_text_encoder(folder, torch.float32)

    def alike(one: str, other: str) -> bool:
        with torch.no_grad():
            first, second = (family.encode_text(encoder, [text])[0]["prompt_embeds"] for text in (one, other))
        return torch.equal(first, second)

    assert not alike(f"{LETTERS[: read - 1]}#", f"{LETTERS[: read - 1]}%")
    assert not alike(f"{LETTERS[: read - 1]}# and more", f"{LETTERS[: read - 1]}% and more")
    assert alike(f"{LETTERS[:read]}# and more", f"{LETTERS[:read]}% and more")
    assert family.cut_captions(folder, []) == []
    whole, *cut = family.cut_captions(folder, [LETTERS[:read], LETTERS[: read + 1], f"{LETTERS[: read - 4]} two words more"])
    assert whole is None
    assert [one.read for one in cut] == [family.spec.text_length] * 2
    assert cut[0].ending == LETTERS[:read][-60:]
    assert cut[1].ending.endswith(" two")
    assert cut[1].tokens - cut[0].tokens == len(" two words more") - 5


@pytest.mark.parametrize("name", READ)
def test_a_caption_is_counted_as_the_pipeline_cleans_it(name, tiny_checkpoint):
    family, folder, read = tiny_family(name), str(tiny_checkpoint(name)), READ[name]
    removes_white_space = name != "ltxvideo"
    (found,) = family.cut_captions(folder, [f"  {LETTERS[:read]}\n"])
    assert (found is None) == removes_white_space
    assert family.cut_captions(folder, ["", "A"]) == [None, None]
