"""Uploading what a run has made, with a model card, to the Hugging Face hub."""

from pathlib import Path

from crepatrain.records.layout import CARD_FILE, RunLayout
from crepatrain.records.opening import config_of, family_of
from crepatrain.records.reading import read_run
from crepatrain.screen import Screen
from crepatrain.sharing.contents import find_result, find_videos, write_card
from crepatrain.sharing.hub import card_on_hub, repository, upload
from crepatrain.sharing.model_card import Card


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
        repo: on the hub; without an owner it is the user's; None: what the config has, or the folder's name.
        private: of a repository that does not exist yet; None: what the config has.
        step: whose adapter; None: the last.
        dry: write the card and list what would be uploaded, without asking the hub for anything.

    Raises:
        UserError: there is nothing to upload, it would do nothing, or the hub refuses it.
    """
    config = config_of(root, screen)
    family, run, card_file = family_of(config), read_run(root), RunLayout(root).card_file
    result = find_result(root, config, family, step)
    videos = find_videos(run, result.recipe["step"])
    repo = repository(repo or config.hub.hub_model_id or root.resolve().name, online=not dry)
    card = Card(run, family, repo, result.weights, result.recipe, list(videos.values()))
    write_card(card_file, card, None if dry else card_on_hub(repo), screen)
    files = {**result.files, **{shown.place: path for path, shown in videos.items()}, CARD_FILE: card_file}
    screen.rows(f"for {repo}", [(place, f"{path.stat().st_size / 2**20:.2f} MiB") for place, path in files.items()])
    for prompt in sorted({prompt for shown in card.videos for prompt in shown.prompts}):
        screen.note(f"the card shows the prompt {prompt!r}")
    if not card.links_base:
        screen.note(f"the card can't link its base, which was a folder called {card.base}: add base_model to it on the hub")
    if dry:
        screen.say(f"nothing was uploaded; the card is {card_file}")
        return
    wanted = config.hub.hub_private_repo if private is None else private
    url, is_private = upload(repo, files, private=wanted, message=f"Step {result.recipe['step']}, by crepatrain")
    screen.say(f"pushed to {url} ({'private: only you see it' if is_private else 'public'})")
