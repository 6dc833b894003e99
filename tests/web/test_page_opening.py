"""What `crepatrain ui` says before there is a page."""

import importlib.util
import socket
import subprocess
import sys

import pytest

from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.web.opening import open_page


def test_without_the_extra_it_says_how_to_install_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nicegui" else find(name))
    with pytest.raises(UserError, match=r'pip install -c constraints.txt -e "\.\[ui\]"'):
        open_page(0, None, tmp_path / "runs", [tmp_path], Screen(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_a_port_that_is_taken_is_said_in_one_message(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "crepatrain", "ui", "--port", str(port), "--runs", "runs"]
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr
