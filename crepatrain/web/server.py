"""The server of the page: its addresses, and where it listens."""

import contextlib
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from nicegui import ui

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import with_distinct_names
from crepatrain.reporting.page import page
from crepatrain.reporting.report import MOST_RUNS
from crepatrain.screen import Screen
from crepatrain.web.confinement import Folders
from crepatrain.web.drafts import Draft
from crepatrain.web.estimates import Estimates
from crepatrain.web.frame import Site
from crepatrain.web.gate import Gate
from crepatrain.web.new_run import step_page
from crepatrain.web.processes import Processes
from crepatrain.web.run_pages import run_page, runs_page
from crepatrain.web.runs import Runs

LOOPBACK = "127.0.0.1"


def serve(port: int, host: str | None, runs: Path, data: Sequence[Path], screen: Screen) -> None:
    """Serve the page until a signal ends it.

    Args:
        port: 0: any that is free.
        host: to listen on; None: this machine alone. Otherwise a token is needed, which is printed.

    Raises:
        UserError: the port is taken, or the folder of runs can't be made.
    """
    folders = Folders(runs, tuple(data))
    try:
        folders.own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs {runs}: it can't be written to ({error})", "give another folder") from error
    with _listening(host or LOOPBACK, port) as listening:
        port = listening.getsockname()[1]
        token = None if host is None else secrets.token_urlsafe(24)
        application = Gate(_application(folders), token, port)
        shown = f"[{host}]" if host and ":" in host else host or "localhost"
        screen.say(f"http://{shown}:{port}/{f'?token={token}' if token else ''}")
        screen.say(f"runs in {folders.runs}, data in {', '.join(map(str, folders.data))}; Ctrl-C ends the page, and no run")
        # What a browser still holds open does not keep the page from its end.
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would share the port with another program
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()  # who asks while the server still begins is kept waiting, not refused
    except OSError as error:
        made.close()
        raise UserError(f"{host}, port {port}: {error.strerror or error}", "give another --port or --host") from error
    return made


def _application(folders: Folders) -> FastAPI:
    processes = Processes(folders)
    runs = Runs(folders, processes)
    site = Site(folders, Draft(folders), processes, runs, Estimates(folders))
    application = FastAPI(openapi_url=None)

    @application.get("/video")
    def video(run: str, file: str) -> Response:
        try:
            layout = RunLayout(folders.run(run))
            found = {path.name: path for path in (*layout.all_videos(), *layout.asked_videos())}
        except UserError:
            found = {}
        if file not in found:
            return PlainTextResponse("no such video\n", 404)
        return FileResponse(found[file], media_type="video/mp4", headers={"cache-control": "no-cache"})

    @application.get("/clip")
    def clip(number: int) -> Response:
        shown = site.clips.clips
        if not 0 <= number < len(shown) or not folders.holds(shown[number].path):
            return PlainTextResponse("no such clip\n", 404)
        return FileResponse(shown[number].path, headers={"cache-control": "no-cache", "content-security-policy": "sandbox"})

    @application.get("/report")
    def report(run: Annotated[list[str], Query(max_length=MOST_RUNS)]) -> Response:
        try:
            text = page(with_distinct_names([runs.read(name) for name in run]))
        except UserError as error:
            return PlainTextResponse(f"{error}\n".encode(errors="replace"), 404)
        # It needs nothing of this page, and gets nothing: a sandbox without its origin.
        headers = {"content-security-policy": "sandbox allow-scripts"}
        return HTMLResponse(text.encode(errors="replace"), headers=headers)

    @ui.page("/")
    async def _runs() -> None:
        await runs_page(site)

    @ui.page("/new/{name}")
    async def _step(name: str) -> None:
        await step_page(site, name)

    @ui.page("/run/{name:path}")
    async def _run(name: str) -> None:
        await run_page(site, name)

    # Nothing is bound to anything, so no loop has to look for changes.
    ui.run_with(application, title="crepatrain", dark=None, binding_refresh_interval=None, show_welcome_message=False)
    return application
