"""What a run has made, with a model card, on the Hugging Face hub."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from crepatrain.adapters.adapter_file import Model, read_adapter
from crepatrain.adapters.checks import check_adapter
from crepatrain.adapters.recipe import SCHEMA, recipe
from crepatrain.config.sections import RunConfig
from crepatrain.data.encode import video_facts
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.files import written_aside
from crepatrain.records.layout import ADAPTER_FILE
from crepatrain.records.reading import RunRecord, read_run
from crepatrain.records.runfolder import adapter_name, config_of, family_of
from crepatrain.screen import Screen
from crepatrain.sharing.model_card import Card, Shown
from crepatrain.training.checkpoint import checkpoints, read_plain

CARD_FILE = "README.md"
# Newest first, beside the newest of validation and what the base made of its prompts.
_SAMPLES = 4
_OF_BASE = "step-000000.mp4"
_TOKEN = "run `hf auth login` with a token that may write, or set HF_TOKEN"  # noqa: S105 - it is none


@dataclass(frozen=True, eq=False)
class _Upload:
    """What goes to the hub.

    Attributes:
        weights: in the repository: the adapter's file, or the transformer's folder.
        files: by their place in the repository, without the card.
        recipe: as an adapter's header holds it.
    """

    weights: str
    files: Mapping[str, Path]
    recipe: Mapping[str, Any]


def push(
    root: Path,
    screen: Screen,
    *,
    repo: str | None = None,
    private: bool | None = None,
    step: int | None = None,
    dry: bool = False,
) -> None:
    """Upload a run's adapter or transformer, its videos and a model card; clips, captions, config and checkpoints stay here.

    Args:
        root: the run's folder.
        repo: on the hub; without an owner it is the user's; None: what the config says, or the folder's name.
        private: of a repository that does not exist yet; None: what the config says.
        step: whose adapter; None: the last.
        dry: write the card and say what would go, without asking the hub for anything.

    Raises:
        UserError: there is nothing to upload, it would do nothing, or the hub does not take it.
    """
    config = config_of(root)
    family, run = family_of(config), read_run(root)
    upload = _weights(root, config, family, step)
    videos = _videos(run, upload.recipe["step"])
    shown = [Shown(f"samples/{path.name}", prompts, base=path.name == _OF_BASE) for path, prompts in videos.items()]
    repo = _repository(repo or config.hub_model_id or root.resolve().name, ask=not dry)
    card = Card(run, family, repo, upload.weights, upload.recipe, shown)
    files = {**upload.files, **{f"samples/{path.name}": path for path in videos}, CARD_FILE: root / CARD_FILE}
    _write_card(root / CARD_FILE, card, screen, there=not dry)
    screen.rows(f"for {repo}", [(place, f"{path.stat().st_size / 2**20:.2f} MiB") for place, path in files.items()])
    for prompt in sorted({prompt for one in shown for prompt in one.prompts}):
        screen.note(f"the card shows the prompt {prompt!r}")
    if not card.links_base:
        screen.note(f"the card can't link its base, which was a folder called {card.base}: add base_model to it on the hub")
    if dry:
        screen.say(f"nothing was uploaded; the card is {root / CARD_FILE}")
        return
    api = HfApi()
    with _hub(repo):
        url = api.create_repo(repo, private=config.hub_private_repo if private is None else private, exist_ok=True)
        additions = [CommitOperationAdd(place, str(path)) for place, path in files.items()]
        api.create_commit(repo, additions, commit_message=f"Step {upload.recipe['step']}, by crepatrain")
        seen = "private: only you see it" if api.model_info(repo).private else "public"
    screen.say(f"pushed to {url} ({seen})")


def expect_pushable(config: RunConfig) -> None:
    """Make sure before the training that its result can be uploaded behind it.

    Raises:
        UserError: the hub can't be reached, or does not know who asks.
    """
    _repository(config.hub_model_id or Path(config.output_dir).resolve().name, ask=True)


def _repository(name: str, *, ask: bool) -> str:
    """The name with its owner, who is the user where none is given.

    Args:
        ask: the hub, who the user is, and whether they may write.
    """
    if ask:
        with _hub(name):
            me = HfApi().whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{name}: your token for the hub may only read", _TOKEN)
        name = name if "/" in name else f"{me['name']}/{name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: no name of a repository ({error})", "set hub_model_id to owner/name") from error
    return name


def _weights(root: Path, config: RunConfig, family: Family, step: int | None) -> _Upload:
    if config.model_type == "full":
        if step is not None:
            raise UserError(f"--step {step}: this run trained the whole transformer, and keeps the last alone", "leave it out")
        part, found = family.variant.transformer, checkpoints(root / "checkpoints")
        paths = sorted(path for path in (root / part).glob("*") if path.is_file())
        if not paths or not found:
            raise UserError(f"{root / part}: there is no transformer yet", "train first")
        state, fingerprint = read_plain(found[-1], "state"), read_plain(found[-1], "fingerprint")
        return _Upload(
            part,
            {f"{part}/{path.name}": path for path in paths},
            recipe(config, family, fingerprint, state["step"], (), averaged=config.use_ema),
        )
    name = adapter_name(config, family)
    path = root / ADAPTER_FILE if step is None else root / "adapters" / f"{name}-{step:06d}.safetensors"
    file = read_adapter(path)
    if file.recipe().get("schema") != SCHEMA:
        raise UserError(f"{path}: its header holds no recipe, so nothing can be told of it", f"run `crepatrain export {root}`")
    problems = check_adapter(file, Model(family, family.empty_transformer(), family.variant.title)).problems
    if problems:
        raise UserError.of(list(problems))
    # Both experts may go into one repository.
    place = f"{name}.safetensors" if family.variant.expert else ADAPTER_FILE
    return _Upload(place, {place: path}, file.recipe())


def _videos(run: RunRecord, step: int) -> dict[Path, list[str]]:
    """The videos worth showing, the best first, and their prompts: of `sample`, and validation's beside the base's.

    Captions are nobody's business: a video of one is left out.
    """
    found: dict[Path, list[str]] = {}
    samples = sorted((run.root / "samples").glob("*-beside-base.mp4"), key=lambda path: -path.stat().st_mtime)
    for path in samples:
        facts = video_facts(path)
        if facts.get("step") == step and "prompt" in facts and not facts.get("caption") and len(found) < _SAMPLES:
            found[path] = [facts["prompt"]]
    of_run = [path for at, path in run.videos if at <= step]
    for path in [*of_run[:1], *(path for path in of_run[1:] if path.name == _OF_BASE)]:
        facts = video_facts(path)
        if "prompts" in facts:
            found[path] = list(facts["prompts"])
    return found


def _write_card(path: Path, card: Card, screen: Screen, *, there: bool) -> None:
    """The card in the run's folder, over the one that the repository has, or else the folder.

    Args:
        there: look into the repository.

    Raises:
        UserError: it can't be written, or the one before can't be read.
    """
    try:
        mine = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error})", "mend or remove it") from error
    theirs = _card_there(card.repo) if there else None
    text = card.over(mine if theirs is None else theirs)
    try:
        if None not in (mine, theirs) and mine != theirs:
            left = path.replace(path.with_name(f"{path.name}.left"))
            screen.note(f"the hub's card was taken over {path}, which differed: that one is {left} now")
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})", "free disk space, or mend its permissions") from error


def _card_there(repo: str) -> str | None:
    """The card that the repository has; None where it has none, or is not there."""
    # Not through the cache, from which an old one would come where the hub does not answer.
    with _hub(repo), tempfile.TemporaryDirectory() as folder:
        try:
            path = hf_hub_download(repo, CARD_FILE, endpoint=constants.ENDPOINT, local_dir=folder)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError):
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """What the hub's client raises, as what the user can do about it."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo}: the hub does not know who you are", _TOKEN) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set", "unset it; `crepatrain push` uploads a run that is complete") from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        said = (str(error).strip().splitlines() or ["nothing"])[-1]
        if code in {401, 403}:
            raise UserError(f"{repo}: the hub does not let you write there ({said})", _TOKEN) from error
        raise UserError(f"{repo}: the hub answered {code} ({said})", "try `crepatrain push` again later") from error
    except ValueError as error:  # the card's metadata
        said = " ".join(str(error).split())
        raise UserError(f"{repo}: the hub does not take the card ({said})", f"mend the metadata of {CARD_FILE}") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{repo}: {constants.ENDPOINT} can't be reached ({error})", "connect, then `crepatrain push`") from error
