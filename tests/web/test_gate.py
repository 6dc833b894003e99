"""Only the page itself may ask, and from another machine only who has the token."""

import asyncio

import pytest

from crepatrain.web.gate import Gate

OWN = {"host": "localhost:7860"}
AFAR = {"host": "gpu-box:7860"}


def answer(
    headers: dict[str, str], *, token: str | None = None, kind: str = "http", method: str = "GET", query: str = "", path="/"
):
    """The status of an HTTP answer with its headers, or of a websocket whether it was let through."""
    sent = []

    async def behind(scope, receive, send):
        status = 200 if kind == "http" else None
        await send({"type": "http.response.start", "status": status, "headers": []} if status else {"type": "websocket.accept"})

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(Gate(behind, token, 7860)(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"] == "websocket.accept"
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "localhost", "LOCALHOST:9000"])
def test_its_own_names(host):
    assert answer({"host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example:7860", "localhost.evil.example", "192.168.0.2:7860", "", "[::1].evil"])
def test_another_name_for_this_machine_is_refused(host):
    assert answer({"host": host})[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9999", "https://localhost.evil:7860", "file://"]
)
def test_another_pages_requests_are_refused(origin):
    assert answer(OWN | {"origin": origin}, method="POST")[0] == 403
    assert answer(OWN | {"origin": origin, "upgrade": "websocket"}, kind="websocket") is False


def test_the_pages_own_requests_pass():
    assert answer(OWN | {"origin": "http://localhost:7860"}, method="POST")[0] == 200
    assert answer(OWN | {"origin": "http://localhost:7860"}, kind="websocket") is True


def test_a_websocket_without_an_origin_is_no_browsers():
    assert answer(OWN, kind="websocket") is False


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_page_embeds_is_refused(site):
    assert answer(OWN | {"sec-fetch-site": site, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "video"})[0] == 403
    assert answer(OWN | {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"})[0] == 403
    assert answer(OWN | {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"})[0] == 200


def test_no_page_frames_this_one():
    assert answer(OWN)[1][b"x-frame-options"] == b"DENY"


def test_with_a_token_nothing_without_it():
    assert answer(AFAR, token="right")[0] == 403
    assert answer(AFAR | {"cookie": "crepatrain-7860=wrong"}, token="right")[0] == 403
    assert answer(AFAR, token="right", query="token=wrong")[0] == 403
    websocket = AFAR | {"origin": "http://gpu-box:7860"}
    assert answer(websocket, token="right", kind="websocket") is False
    assert answer(websocket, token="right", kind="websocket", query="token=right") is False


def test_the_printed_address_leaves_a_cookie_and_no_token():
    status, headers = answer(AFAR, token="right", query="token=right&a=1", path="//evil.example")
    assert status == 303
    assert headers[b"location"] == b"/evil.example?a=1"
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie
    assert "SameSite" in cookie
    shown = {"cookie": f"other=1; {cookie.split(';')[0]}"}
    assert answer(AFAR | shown, token="right")[0] == 200
    assert answer(AFAR | shown | {"origin": "http://gpu-box:7860"}, token="right", kind="websocket") is True
    assert answer(AFAR | shown | {"origin": "http://evil.example"}, token="right", kind="websocket") is False
