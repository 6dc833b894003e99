"""Who may speak to the page: no other page in the same browser, and from another machine only who has the token."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_TOKEN = "token"  # noqa: S105 - the name of the parameter
# The page is shown in no frame of another one, and no file of it is read as anything but what it is.
_HEADERS = ((b"x-frame-options", b"DENY"), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Gate:
    """An ASGI application in front of another one; refuses with 403 what is not from the page itself.

    Args:
        token: what a browser has to show; None for a page of this machine alone, which is asked for by its loopback names.
    """

    def __init__(self, app: App, token: str | None, port: int) -> None:
        self._app = app
        self._token = token
        self._cookie = f"crepatrain-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        shown = query.pop(_TOKEN, None)
        reason = refusal(scope, headers, any_host=self._token is not None)
        if reason is None and self._token is not None and scope["type"] == "http" and self._same(shown):
            await self._let_in(scope, query, send)
        elif reason is None and self._token is not None and not self._same(_cookie(headers.get("cookie", ""), self._cookie)):
            await _refuse(scope, receive, send, "open the address with the token that `crepatrain ui` has printed")
        elif reason is not None:
            await _refuse(scope, receive, send, reason)
        else:
            await self._app(scope, receive, _with_headers(send))

    def _same(self, shown: str | None) -> bool:
        assert self._token is not None
        return shown is not None and hmac.compare_digest(shown.encode(), self._token.encode())

    async def _let_in(self, scope: Scope, query: dict[str, str], send: Send) -> None:
        """Keep the token in a cookie, and take it out of the address."""
        rest = f"?{urlencode(query)}" if query else ""
        path = "/" + scope["path"].lstrip("/\\")  # `//host` would lead elsewhere
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Lax"
        location = (b"location", (path + rest).encode("latin-1", "replace"))
        headers = [location, (b"set-cookie", cookie.encode()), *_HEADERS]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def refusal(scope: Scope, headers: MutableMapping[str, str], *, any_host: bool) -> str | None:
    """Why a request is refused; None where it is the page's own.

    Args:
        any_host: whether the page may be asked for by any name: a token then takes the place of the name.
    """
    host = headers.get("host", "")
    if not any_host and _name(host) not in _LOOPBACK:
        return "open the page as http://localhost"
    origin = headers.get("origin")
    if origin is not None and (urlsplit(origin).scheme not in {"http", "https"} or urlsplit(origin).netloc != host):
        return "the request comes from another page"
    if scope["type"] == "websocket":
        return "a websocket needs an Origin" if origin is None else None
    site = headers.get("sec-fetch-site", "same-origin")
    opened = (
        scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )
    if site not in {"same-origin", "none"} and not opened:
        return "the request comes from another page"
    return None


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdecimal() else host).lower()


def _cookie(header: str, name: str) -> str | None:
    for part in header.split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return None


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            more = [header for header in _HEADERS if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


async def _refuse(scope: Scope, receive: Receive, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"refused: {reason}\n".encode()})
