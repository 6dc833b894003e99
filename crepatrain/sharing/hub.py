"""The Hugging Face hub: who the user is there, what a repository holds, and uploading to it."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.errors import UserError
from crepatrain.records.layout import CARD_FILE

_TOKEN = "run `hf auth login` with a token that may write, or set HF_TOKEN"  # noqa: S105 - it is none


def expect_pushable(config: ResolvedConfig) -> None:
    """Make sure before the training that its result can be uploaded after it.

    Raises:
        UserError: the hub can't be reached, or does not know who asks.
    """
    repository(config.hub.hub_model_id or Path(config.loop.output_dir).resolve().name, online=True)


def repository(name: str, *, online: bool) -> str:
    """The name of a repository with its owner, who is the user where none is given.

    Args:
        online: ask the hub who the user is, and whether they may write; without it a missing owner stays missing.

    Raises:
        UserError: the user may not write, or the name is none that the hub allows.
    """
    if online:
        with _readable_errors(name):
            me = HfApi().whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{name}: your token for the hub may only read", _TOKEN)
        name = name if "/" in name else f"{me['name']}/{name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: not the name of a repository ({error})", "set hub_model_id to owner/name") from error
    return name


def card_on_hub(repo: str) -> str | None:
    """The model card that a repository has; None where it has none, or does not exist."""
    # Not through the cache, from which an old one would come where the hub does not answer.
    with _readable_errors(repo), tempfile.TemporaryDirectory() as folder:
        try:
            path = hf_hub_download(repo, CARD_FILE, endpoint=constants.ENDPOINT, local_dir=folder)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError):
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")


def upload(repo: str, files: Mapping[str, Path], *, private: bool, message: str) -> tuple[str, bool]:
    """Upload files in one commit; the repository is made where it does not exist.

    Args:
        files: by their place in the repository.
        private: whether only the user sees a repository that is made now.
        message: of the commit.

    Returns:
        The repository's address, and whether it is private.

    Raises:
        UserError: a file can't be read, or the hub can't be reached, or refuses.
    """
    api = HfApi()
    operations = [_operation(place, path) for place, path in files.items()]
    if CARD_FILE in files:
        _expect_accepted(repo, files[CARD_FILE])
    with _readable_errors(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
        return str(url), bool(api.model_info(repo).private)


def _operation(place: str, path: Path) -> CommitOperationAdd:
    """The upload of a file, which is read here for its digest."""
    try:
        return CommitOperationAdd(place, str(path))
    except (OSError, ValueError) as error:  # a ValueError where there is no file
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read ({error})", "put it back or fix its permissions, then `crepatrain push`")


def _expect_accepted(repo: str, path: Path) -> None:
    """Ask the hub whether it accepts a card, before anything is made there."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise _cannot_read(path, error) from error
    with _readable_errors(repo):
        try:
            card.validate()
        except HfHubHTTPError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{repo}: the hub does not accept the card ({reason})", f"fix the metadata of {path}") from error


@contextmanager
def _readable_errors(repo: str) -> Iterator[None]:
    """What the hub's client raises, as what the user can do about it."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo}: the hub does not know who you are", _TOKEN) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set", "unset it; `crepatrain push` uploads a run that is complete") from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        reason = (str(error).strip().splitlines() or ["nothing"])[-1]
        if code in {401, 403}:
            raise UserError(f"{repo}: the hub does not let you write there ({reason})", _TOKEN) from error
        raise UserError(f"{repo}: the hub answered {code} ({reason})", "try `crepatrain push` again later") from error
    except json.JSONDecodeError as error:
        fix = "try `crepatrain push` again later, or from another network"
        raise UserError(f"{repo}: {constants.ENDPOINT} does not answer as the hub does ({error})", fix) from error
    except (HTTPError, ConnectionError, TimeoutError, FileMetadataError, LocalEntryNotFoundError) as error:
        raise UserError(f"{repo}: {constants.ENDPOINT} can't be reached ({error})", "connect, then `crepatrain push`") from error
    except OSError as error:
        fix = "free disk space or fix its permissions, then `crepatrain push`"
        raise UserError(f"{repo}: a file of this machine can't be read or written ({error})", fix) from error
