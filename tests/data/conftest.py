"""What tests of several files in this folder read."""

from pathlib import Path

import pytest
from hard_clips import write_hard_clips


@pytest.fixture(scope="session")
def hard_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the files that naive loaders get wrong; not to be changed."""
    folder = tmp_path_factory.mktemp("hard") / "clips"
    folder.mkdir()
    write_hard_clips(folder)
    return folder
