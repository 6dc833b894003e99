"""Whether a run may go on: its config is the one that its folder holds, and its checkpoint was made from the same things."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crepatrain.config.run_config import KEYS
from crepatrain.errors import UserError


def expect_same_config(root: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the config that a run's folder holds with the one that it shall go on with.

    Raises:
        UserError: a key differs that would make another run of it. One that this version does not know counts as well: it may
            have meant something.
    """
    # A key that the run did not know yet had the meaning of its default.
    defaults = {key: info.field.default for key, info in KEYS.items() if key not in before}
    before = {**before, **{key: now[key] if default is None else default for key, default in defaults.items()}}
    changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key) and not _may_change(key)]
    if changed:
        listed = "; ".join(f"{key}: {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} here" for key in changed)
        raise UserError(
            f"output_dir={root} holds a different run ({listed})",
            "give a new output_dir, or the same values to continue it",
        )


def _may_change(key: str) -> bool:
    return key == "output_dir" or (key in KEYS and KEYS[key].may_change)


def expect_same_fingerprint(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made from with what there is now.

    Raises:
        UserError: something of it has changed.
    """
    # The encoder is in neither where no teacher is asked any more.
    parts = sorted(
        part for part in before["models"].keys() & now["models"].keys() if before["models"][part] != now["models"][part]
    )
    changed = [f"the weights of {', '.join(parts)}"] if parts else []
    changed += ["the clips or captions"] if before["samples"] != now["samples"] else []
    changed += ["the number of samples of a step"] if before["unit"] != now["unit"] else []
    if changed:
        raise UserError(f"{' and '.join(changed)} changed since this run's checkpoint", "put them back, or give a new output_dir")
