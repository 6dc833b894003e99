"""The page as a process of its own, and a browser that opens it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The page on a free port, for the folders runs and data of a folder; yields its address and the process."""
    command = [sys.executable, "-m", "crepatrain", "ui", "--port", "0", "--runs", "runs", *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.match(r"http://\S+", first)
        assert found, first + process.stdout.read()
        yield found.group().removesuffix("/"), process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def opened(address: str, **context) -> Iterator:
    """A page of a browser at an address; what goes wrong in its scripts fails the test."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: nothing opens the page")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: nothing opens the page")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(20_000)
        wrong, asked = [], []
        page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        own = {"", urlsplit(address).netloc}  # "": data and blob
        elsewhere = [url for url in asked if urlsplit(url).netloc not in own]
        browser.close()
        assert wrong == []
        assert elsewhere == []


def until(holds, seconds: float = 120.0):
    """Wait for something to hold; gives what it gave."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.2)
    return found
