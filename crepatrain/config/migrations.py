"""Config files of earlier versions, as the newest version has them.

A config.json that a run writes carries `config_version` beside its keys; a file without it is of version 1. A key that is
renamed, removed, or from now on always filled in by resolving needs a migration here, so that earlier files are still read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from crepatrain.errors import UserError

VERSION_KEY = "config_version"

# From each version but the newest to the one after it: the flat keys of a file, as the next version has them.
Migrations = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]
MIGRATIONS: Migrations = {}

CONFIG_VERSION = len(MIGRATIONS) + 1


def migrate(values: Mapping[str, Any], file: object, migrations: Migrations = MIGRATIONS) -> dict[str, Any]:
    """The keys of a config file of any version, as the newest version has them, without `config_version`.

    Args:
        file: what messages call the file.

    Raises:
        UserError: the file is of a newer version, or its version is no number.
    """
    newest, about = len(migrations) + 1, (VERSION_KEY,)
    migrated = dict(values)
    version = migrated.pop(VERSION_KEY, 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        what = f"{file}: {VERSION_KEY}={version!r} is not a version"
        raise UserError(what, f"write a whole number from 1 to {newest}, as the run wrote it", about)
    if version > newest:
        what = f"{file} is of {VERSION_KEY} {version}, and this crepatrain reads versions up to {newest}"
        raise UserError(what, "upgrade crepatrain", about)
    for step in range(version, newest):
        migrated = migrations[step](migrated)
    return migrated
