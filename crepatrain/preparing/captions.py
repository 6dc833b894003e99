"""The captions of a dataset, and what should be known of them before they are encoded."""

from collections.abc import Sequence
from pathlib import Path

from crepatrain.config.datasets import NamedDataset
from crepatrain.config.plan import Plan
from crepatrain.data.clip import Rule
from crepatrain.data.listing import Captioned, CaptionedClip, Listed, choose_captions, list_clips
from crepatrain.data.lists import Part
from crepatrain.outputs import is_run
from crepatrain.preparing.context import Context
from crepatrain.training.build import cut_captions

_MOST_NAMED = 5


def read_captions(plan: Plan, dataset: NamedDataset, key: str) -> tuple[Listed, Captioned]:
    """What a dataset names, without the folders of runs and of the cache, and the caption of every clip."""
    config, own = plan.config.data, dataset.config
    ours = {Path(plan.config.loop.output_dir).resolve(), Path(config.cache_dir).resolve()}
    listed = list_clips(dataset.path, key, lambda folder: folder.resolve() in ours or is_run(folder))
    prefix = config.caption_prefix if own.caption_prefix is None else own.caption_prefix
    suffix = config.caption_suffix if own.caption_suffix is None else own.caption_suffix
    return listed, choose_captions(listed, config.missing_captions, prefix=prefix, suffix=suffix)


def rule_of(plan: Plan, dataset: NamedDataset, part: Part) -> Rule:
    """How a clip of a dataset is cut: what its entry in a list says comes before its dataset, and that before the run.

    Times are the file's: a part of a clip is cut further by its dataset.
    """
    config, own = plan.config.data, dataset.config
    fps = part.fps or own.fps or (None if config.fps == "keep" else config.fps)
    ends = [end for end in (part.end, own.end) if end is not None]
    start, end = max(part.start, own.start), min(ends) if ends else None
    return Rule(plan.size_of(dataset), fps, own.clip_mode or config.clip_mode, start, end, own.repeats * part.repeats)


def note_captions(context: Context, clips: Sequence[CaptionedClip], key: str, *, download: bool) -> None:
    """Note captions that are longer than the text encoder reads, and a trigger word that is in none.

    Args:
        clips: that are used, with their captions.
        key: of the config, that names the dataset.
        download: whether the tokenizers may be downloaded.
    """
    trigger = context.plan.config.loop.trigger_word
    if trigger and key == "train_data" and not any(_plain(trigger) in _plain(clip.caption) for clip in clips):
        context.screen.note(
            f"trigger_word={trigger!r}: no caption holds it, so the adapter does not learn it; "
            f"set caption_prefix to {f'{trigger}, '!r} to put it before each"
        )
    for note in _cut_ones(context.plan, clips, download=download):
        context.screen.note(note if key == "train_data" else f"{key}: {note}")


def _cut_ones(plan: Plan, clips: Sequence[CaptionedClip], *, download: bool) -> list[str]:
    sources: dict[str, list[str]] = {}
    for clip in clips:
        sources.setdefault(clip.caption, []).append(clip.source)
    limit = plan.spec.text_length_of(plan.variant)
    cut = cut_captions(plan, list(sources), download=download)
    if cut is None:
        return [f"the text encoder reads {limit} tokens: long captions are not counted, as its tokenizer is not downloaded yet"]
    found = [(source, one) for one, names in zip(cut, sources.values(), strict=True) if one for source in names]
    notes = [
        f"{source}: {one.tokens} tokens, and {one.read} are read: the caption is cut after {f'...{one.ending}'!r}"
        for source, one in found[:_MOST_NAMED]
    ]
    if len(found) > _MOST_NAMED:
        notes.append(f"{len(found) - _MOST_NAMED} more captions are longer than the {limit} tokens that the text encoder reads")
    return notes


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
