"""The JSON files of a checkpoint or a vision encoder, from a folder, the hub's cache, the hub, or the package's own knowledge."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from crepatrain.errors import UserError, closest
from crepatrain.specs import (
    ENCODERS,
    FAMILIES,
    Checkpoint,
    EncoderSpec,
    Expert,
    FamilySpec,
    Unsupported,
    Variant,
    WrongContent,
    has_part,
    released_model,
)

BASE_KEY = "pretrained_model_name_or_path"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def read_checkpoint(
    path: str, revision: str | None, spec: FamilySpec, expert: Expert | None, *, online: bool, key: str = BASE_KEY
) -> tuple[Checkpoint, Variant]:
    """The JSON files of a diffusers pipeline, and what it is among the checkpoints of its family.

    Args:
        path: a local folder or a hub id.
        revision: of a hub id.
        expert: the transformer to train of a checkpoint that has two.
        online: ask the hub for files that are not in its cache. Otherwise a released model that the package knows is taken from
            its table, and only an unknown one is asked for.
        key: where the path was written.

    Raises:
        UserError: it does not exist, lacks a part, can't be reached, or is of another family or kind.
    """
    local = Path(path).is_dir()
    if not local:
        _expect_hub_id(key, path, "diffusers")
        known = released_model(spec, path)
        if known is not None and not online and not _in_hub_cache(path, "model_index.json", revision):
            return known.checkpoint, spec.variant(known.checkpoint, expert)
    files = ("vae/config.json", "scheduler/scheduler_config.json")
    transformers = ("transformer/config.json", "transformer_2/config.json")
    try:
        folder = fetch(key, path, revision, ("model_index.json", *transformers, *files))
    except UserError as error:
        close = closest(path, [model.repo for model in spec.released.values() if model.repo], cutoff=0.8)
        if close is None or close == path:
            raise
        raise UserError(error.problems[0].what, f"did you mean {close}?", (key,)) from error
    if local:
        expect_parts(key, folder, ("vae", "scheduler") if expert == "low" else ("transformer", "vae", "scheduler"), ())
    model_index = _read_json(key, folder, "model_index.json")
    with readable(key, path, spec):
        second = expert == "low" and has_part(model_index, "transformer_2")
    if local:
        expect_parts(key, folder, ("transformer_2",) if second else ("transformer",), ())
    transformer, vae, scheduler = (_read_json(key, folder, name) for name in (transformers[second], *files))
    found = transformer.get("_class_name", spec.transformer_class)
    if found != spec.transformer_class:
        raise UserError(
            f"{key}={path}: its transformer is a {found}, and model_family={spec.name} needs a {spec.transformer_class}",
            "set the model_family of this checkpoint, or use another checkpoint" if key == BASE_KEY else "give another one",
            (key, "model_family"),
        )
    checkpoint = Checkpoint(model_index, transformer, vae, scheduler, origin="folder" if local else "hub")
    with readable(key, path, spec):
        checkpoint.flow_shift(tokens=1)  # its scheduler holds the numbers that are needed once the size of clips is known
        try:
            variant = spec.variant(checkpoint, expert)
        except Unsupported as reason:
            raise UserError(
                f"{key}={path}: {reason}, which this version can't train", f"use a {spec.title} checkpoint", (key,)
            ) from reason
    if local:
        expect_parts(key, folder, variant.parts, variant.weights)
    return checkpoint, variant


@contextmanager
def readable(key: str, path: str, spec: FamilySpec) -> Iterator[None]:
    """Around what reads the JSON files of a checkpoint.

    Args:
        key: where the path was written.

    Raises:
        UserError: a file does not hold what was read from it.
    """
    try:
        yield
    except WrongContent as error:
        what = f"{key}={path}: a config of its parts is not that of a {spec.title} model ({error})"
        raise UserError(what, "download it again", (key,)) from error


def read_encoder(name: str) -> EncoderSpec:
    """E and the patch size of a vision encoder: of a known name, or from its config.json.

    Raises:
        UserError: an unknown name, or a model that is no vision transformer.
    """
    if name in ENCODERS:
        return ENCODERS[name]
    key = "crepa_encoder"
    if not Path(name).is_dir():
        if "/" not in name:
            close = closest(name, ENCODERS)
            hint = f"did you mean {close}? Otherwise " if close else ""
            use = f"{hint}use one of {', '.join(ENCODERS)}, a folder or a hub id"
            raise UserError(f"{key}={name}: no such encoder", use, (key,))
        _expect_hub_id(key, name, "transformers")
    values = _read_json(key, fetch(key, name, None, ("config.json",)), "config.json")
    width, patch = values.get("hidden_size"), values.get("patch_size")
    if not isinstance(width, int) or not isinstance(patch, int):
        raise UserError(
            f"{key}={name}: its config.json has no hidden_size and patch_size, so it is not a plain vision transformer",
            "use a DINOv2 or DINOv3 model in transformers' format",
            (key,),
        )
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise UserError(f"{key}={name}: it lacks *.safetensors", "copy the whole model folder", (key,))
    return EncoderSpec(name, width, patch, values)


def _expect_hub_id(key: str, path: str, kind: str) -> None:
    if not _HUB_ID.match(path):
        use = f"give a {kind} folder that exists, or a hub id such as owner/name"
        raise UserError(f"{key}={path}: no such folder", use, (key,))


def expect_parts(key: str, folder: Path, parts: Collection[str], weights: Collection[str]) -> None:
    """Make sure that a local pipeline folder is whole.

    Args:
        parts: folders of it.
        weights: those of them that hold safetensors.

    Raises:
        UserError: it lacks a part.
    """
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    missing += [f"{part}/" for part in parts if not (folder / part).is_dir()]
    for part in weights:
        if f"{part}/" not in missing and not any(any((folder / part).glob(pattern)) for pattern in _WEIGHTS):
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise UserError(
            f"{key}={folder}: not a whole diffusers pipeline, it lacks {', '.join(missing)}",
            "download the repository whose name ends in -Diffusers, or write one with `crepatrain make-random`",
            (key,),
        )


def _read_json(key: str, folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        use = "use a folder in diffusers' or transformers' format"
        raise UserError(f"{key}={folder}: it has no {name}", use, (key,)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={folder}: {name} can't be read ({error})", "download it again", (key,)) from None
    if not isinstance(values, dict):
        raise UserError(f"{key}={folder}: {name} holds a {type(values).__name__}", "download it again", (key,))
    return values


def _in_hub_cache(repo: str, name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=revision), str)


@cache
def fetch(key: str, path: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local folder of a model: the path itself, or the hub's snapshot with the files that fit the patterns.

    Raises:
        UserError: the hub can't be reached or does not let us.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with _hub_errors(key, path, revision):
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns), etag_timeout=5))


def local_folder(path: str, revision: str | None) -> Path | None:
    """Where a model lies on this machine: the path itself, or the hub's snapshot; None where it has not been downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(path, "model_index.json", revision=revision)
    return Path(known).parent if isinstance(known, str) else None


def _is_known(repo: str) -> bool:
    """Whether the package knows that the hub has it."""
    released = any(released_model(spec, repo) for spec in FAMILIES.values())
    return released or any(encoder.repo == repo for encoder in ENCODERS.values())


def _absent_folder(key: str) -> str:
    """What else to do, as a path of two names may be that of a folder."""
    write = "; `crepatrain make-random` writes one with random weights" if key == BASE_KEY else ""
    return f". If a local folder is meant, it is not there yet{write}"


@contextmanager
def _hub_errors(key: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub client raises into a UserError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, or_folder = f"{key}={repo}: ", "" if _is_known(repo) else _absent_folder(key)
    try:
        yield
    except GatedRepoError as error:
        fix = "accept them on its page, then run `hf auth login`"
        raise UserError(what + "the hub wants you to accept its terms", fix, (key,)) from error
    except RepositoryNotFoundError as error:
        fix = f"check the name; for a private one run `hf auth login`{or_folder}"
        raise UserError(what + "the hub has no such repository, or it is private", fix, (key,)) from error
    except RevisionNotFoundError as error:
        raise UserError(what + f"it has no revision {revision}", "check revision", (key, "revision")) from error
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        fix = f"connect once (`hf auth login` if gated), or run `hf download {repo}` elsewhere and give the folder{or_folder}"
        raise UserError(what + f"it is not on this machine, and {offline}", fix, (key,)) from error
    except EntryNotFoundError as error:
        fix = "use a repository in diffusers' or transformers' format"
        raise UserError(what + "a file of it is missing", fix, (key,)) from error
    except HfHubHTTPError as error:
        raise UserError(what + f"the hub answered: {error}", "try again later", (key,)) from error
