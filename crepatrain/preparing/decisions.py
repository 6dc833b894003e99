"""What is done to clips that their owner may not expect: in words, and as plain values."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crepatrain.config.resolved import ResolvedData
from crepatrain.data.buckets import ClipCut, ClipWindows

# Less of a picture than that, or a larger factor, is named.
_LEAST_KEPT = 0.5
_LARGEST_FACTOR = 1.25
_LARGEST_SQUEEZE = 1.05

_NAMED = 5


def decision_notes(clips: ClipWindows, data: ResolvedData, sources: Sequence[Path]) -> list[str]:
    """One note for each kind of decision, with the clips that it changes most.

    Args:
        sources: the folders or lists that the clips are from.
    """
    notes = []
    if clips.fitting_frames:
        notes.append(
            f"num_frames={data.num_frames} leaves out {clips.too_short} of {clips.clips} clips: "
            f"with num_frames={clips.fitting_frames} {'it fits' if clips.clips == 1 else f'all {clips.clips} clips fit'}"
        )
    cropped = _sorted(clips, lambda cut: cut.kept if _is_cropped(cut) else None)
    if cropped:
        fix = "choose a height and width nearer to their shape" if data.aspect_buckets else "set aspect_buckets to true"
        named = _named(cropped, sources, lambda cut: f"{cut.kept:.0%}")
        notes.append(f"the centre crop keeps less than half of the picture of {named}; {fix}")
    enlarged = _sorted(clips, lambda cut: -cut.enlarged if _is_enlarged(cut) else None)
    if enlarged:
        named = _named(enlarged, sources, lambda cut: f"{cut.enlarged:.3g} times")
        notes.append(f"smaller than height={data.height}, width={data.width}, and enlarged: {named}; lower height and width")
    squeezed = _sorted(clips, lambda cut: -cut.squeezed if _is_squeezed(cut) else None)
    if squeezed:
        named = _named(squeezed, sources, lambda cut: f"{cut.squeezed:.3g} times")
        notes.append(f"with crop=none these are squeezed to another shape: {named}; set aspect_buckets to true")
    faster = _sorted(clips, lambda cut: -cut.faster if _is_faster(cut) else None)
    if faster:
        named = _named(faster, sources, lambda cut: f"{cut.faster:.3g} times as fast")
        notes.append(f"slower than fps={data.fps:g}, and taken frame by frame, so that they run faster: {named}; lower fps")
    return notes


def decisions(clips: ClipWindows) -> list[dict[str, Any]]:
    """What the notes name, of every such clip, for a run's folder: plain values."""
    return [
        {
            "file": cut.clip.path.name,
            "kept": round(cut.kept, 3),
            "enlarged": round(cut.enlarged, 3),
            "faster": round(cut.faster, 3),
            **({"squeezed": round(cut.squeezed, 3)} if _is_squeezed(cut) else {}),
        }
        for cut in clips.cuts
        if _is_cropped(cut) or _is_enlarged(cut) or _is_faster(cut) or _is_squeezed(cut)
    ]


def clip_warnings(cut: ClipCut) -> list[str]:
    """What the notes say of kinds, of one clip."""
    found = [(_is_cropped(cut), f"cropped: {cut.kept:.0%} of the picture is left")]
    found.append((_is_enlarged(cut), f"enlarged {cut.enlarged:.3g} times"))
    found.append((_is_squeezed(cut), f"squeezed {cut.squeezed:.3g} times"))
    found.append((_is_faster(cut), f"{cut.faster:.3g} times as fast"))
    return [words for holds, words in found if holds]


def dropped_in_words(clips: ClipWindows) -> str:
    """How many frames no window holds, by cause."""
    causes = [(clips.ends, "at ends that fill no window"), (clips.passed_over, "in windows beyond max_windows_per_clip")]
    causes.append((clips.elsewhere, "where clip_mode takes no window"))
    listed = ", ".join(f"{count} {cause}" for count, cause in causes if count)
    return f"{sum(count for count, _ in causes)} dropped" + (f" ({listed})" if listed else "")


def _is_cropped(cut: ClipCut) -> bool:
    return cut.kept < _LEAST_KEPT


def _is_enlarged(cut: ClipCut) -> bool:
    return cut.enlarged > _LARGEST_FACTOR


def _is_squeezed(cut: ClipCut) -> bool:
    return cut.squeezed > _LARGEST_SQUEEZE


def _is_faster(cut: ClipCut) -> bool:
    return cut.faster > _LARGEST_FACTOR


def _sorted(clips: ClipWindows, rank: Callable[[ClipCut], float | None]) -> list[ClipCut]:
    """Those that have a rank, the lowest first."""
    ranked = [(found, cut) for cut in clips.cuts if (found := rank(cut)) is not None]
    return [cut for _, cut in sorted(ranked, key=lambda item: (item[0], str(item[1].clip.path)))]


def _named(cuts: Sequence[ClipCut], sources: Sequence[Path], words: Callable[[ClipCut], str]) -> str:
    """The first of the clips, each with some words, and how many more there are."""
    roots = [source if source.is_dir() else source.parent for source in sources]
    shown = ", ".join(f"{_relative(cut.clip.path, roots)} ({words(cut)})" for cut in cuts[:_NAMED])
    return f"{shown} and {len(cuts) - _NAMED} more" if len(cuts) > _NAMED else shown


def _relative(path: Path, roots: Sequence[Path]) -> Path:
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return path if root is None else path.relative_to(root)
