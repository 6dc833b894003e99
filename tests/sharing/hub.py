"""A server on this machine that answers the hub's real client as the hub does, as far as uploads need it."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Answer = tuple[int, Any, dict[str, str]]
TOKEN = "hf_right"
_NO_REPO: Answer = (404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})


class Hub:
    """What the hub holds and how it behaves.

    Attributes:
        repos: by name, each a dict of files.
        role: of the user's token.
        refuses: status with which every write is answered; 0: none.
        hides: status with which every file is answered; 0: none.
        dislikes: what it finds wrong with a card.
        asked: paths of all requests.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.role = "write"
        self.refuses = 0
        self.hides = 0
        self.dislikes = ""
        self.asked: list[str] = []

    def serve(self) -> ThreadingHTTPServer:
        return ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    def get(self, path: str) -> Answer:
        if path == "api/whoami-v2":
            return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}}, {}
        repo, _, file = path.removeprefix("api/models/").partition("/resolve/main/")
        if repo not in self.repos:
            return _NO_REPO
        if not file:
            return 200, {"id": repo, "private": self.private[repo], "sha": "0" * 40, "siblings": []}, {}
        if self.hides:
            return self.hides, {"error": "no"}, {}
        if file not in self.repos[repo]:
            return 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"}
        return 200, self.repos[repo][file], {"ETag": f'"{hash(self.repos[repo][file])}"', "X-Repo-Commit": "0" * 40}

    def post(self, path: str, sent: bytes) -> Answer:
        if self.refuses:
            return self.refuses, {"error": "no"}, {}
        if path == "api/validate-yaml":
            return (400 if self.dislikes else 200), {"errors": [{"message": self.dislikes}], "warnings": []}, {}
        if path == "api/repos/create":
            return self._create(json.loads(sent))
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}, {}
        return self._commit(path.removeprefix("api/models/").partition("/commit/")[0], sent)

    def _create(self, wanted: dict[str, Any]) -> Answer:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"https://huggingface.co/{repo}"
        if repo in self.repos:
            return 409, {"error": "exists", "url": url}, {}
        self.repos[repo], self.private[repo] = {}, wanted.get("private", wanted.get("visibility") == "private")
        return 200, {"url": url, "id": repo}, {}

    def _commit(self, repo: str, sent: bytes) -> Answer:
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"https://huggingface.co/{repo}/commit/1", "commitOid": "1" * 40, "success": True}, {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(*self.hub.get(self._path()) if self.headers.get("Authorization") == f"Bearer {TOKEN}" else (401, {}, {}))

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        self._answer(*self.hub.post(self._path(), self.rfile.read(int(self.headers["Content-Length"]))))

    def _path(self) -> str:
        path = urlsplit(self.path).path.strip("/")
        self.hub.asked.append(path)
        return path

    def _answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
