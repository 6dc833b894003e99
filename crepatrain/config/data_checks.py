"""What can be wrong with the datasets that a config names, and with the windows that their clips are cut into."""

import os
from collections.abc import Sequence

from crepatrain.config.datasets import DATASETS_FILES, LISTS, NamedDataset
from crepatrain.config.resolved import ResolvedData
from crepatrain.errors import Problem, UserError
from crepatrain.geometry import Geometry


def check_datasets(datasets: Sequence[NamedDataset], output_dir: str) -> list[Problem]:
    """Every dataset exists, holds something, and is not the folder of the run."""
    problems = []
    for dataset in datasets:
        path, named = dataset.path, dataset.where or f"train_data={dataset.path}"
        if not path.exists():
            problems.append(Problem(f"{named}: it does not exist", "give a folder of clips, or a list of them", ("train_data",)))
        elif path.is_dir() and not any(path.iterdir()):
            problems.append(
                Problem(f"{named}: the folder is empty", "put video files and NAME.txt captions into it", ("train_data",))
            )
        elif path.is_file() and path.suffix.lower() not in LISTS:
            others = "" if dataset.where else f", or a {', '.join(sorted(DATASETS_FILES))} file that names datasets"
            what = f"{named}: neither a folder nor a .jsonl, .csv or .json list{others}"
            problems.append(Problem(what, "give the folder of the clips", ("train_data",)))
        if os.path.realpath(output_dir) == os.path.realpath(path):  # Path.resolve raises where links loop
            what = f"output_dir={output_dir}: it is the folder of {dataset.where or 'train_data'}"
            problems.append(Problem(what, "give a folder of its own", ("output_dir",)))
    return problems


def check_windows(data: ResolvedData, datasets: Sequence[NamedDataset], geometry: Geometry) -> list[Problem]:
    """The model can take every size and length of a window that is named."""
    frames, height, width = data.size
    problems = _wrong_size("", frames, height, width, geometry)
    for size in data.aspect_buckets if isinstance(data.aspect_buckets, list) else ():
        problems += _wrong_size(f"aspect_buckets={size}: ", _legal(frames, geometry), size[0], size[1], geometry)
    for length in data.frame_buckets if isinstance(data.frame_buckets, list) else ():
        problems += _wrong_length(length, data, geometry)
    for dataset in datasets:
        own = dataset.config
        if own.num_frames or own.height or own.width:
            sizes = (own.num_frames or _legal(frames, geometry), own.height or height, own.width or width)
            problems += _wrong_size(f"{dataset.where}: ", *sizes, geometry)
    return problems


def _wrong_length(frames: int, data: ResolvedData, geometry: Geometry) -> list[Problem]:
    keys = ("frame_buckets", "num_frames")
    if frames > data.num_frames:
        what = f"frame_buckets={frames}: more than num_frames={data.num_frames}, which is the most"
        return [Problem(what, f"set num_frames to {frames}, or leave it out", keys)]
    if geometry.legal_frames(frames):
        return []
    near = " or ".join(map(str, geometry.nearest_frames(frames)))
    return [Problem(f"frame_buckets={frames}: the model takes {geometry.frames_rule} frames", f"use {near}", keys[:1])]


def _legal(frames: int, geometry: Geometry) -> int:
    return frames if geometry.legal_frames(frames) else geometry.nearest_frames(frames)[-1]


def _wrong_size(where: str, frames: int, height: int, width: int, geometry: Geometry) -> list[Problem]:
    """Each of the three numbers by itself, so that all that are wrong are reported."""
    rows, columns = geometry.size_multiple
    problems: list[Problem] = []
    for size in ((frames, rows, columns), (_legal(frames, geometry), height, columns), (_legal(frames, geometry), rows, width)):
        try:
            geometry.latent_shape(*size)
        except UserError as error:
            problems += [Problem(f"{where}{problem.what}", problem.fix, problem.keys) for problem in error.problems]
    return problems
