"""Files come to the server by upload only: what a request names by an address is not fetched."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 4 * 2**20  # bytes of a request that is no upload
REFUSED = "files are uploaded, not fetched from addresses: send the file itself"


class NoAddresses:
    """ASGI middleware. Gradio downloads whatever http address stands in the place of a file, whole and unasked.

    Args:
        app: the server behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body of a POST that is no upload, and pass it on or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith("/upload"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= LARGEST:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > LARGEST:
            await _refuse(send, 413, f"a request has at most {LARGEST} bytes")
        elif names_address(body):
            await _refuse(send, 400, REFUSED)
        else:
            await self.app(scope, _once(body, receive), send)


def names_address(body: bytes) -> bool:
    """Whether JSON has a file (an object with a ``path``) that lies elsewhere."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # the server behind says what is wrong with it
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path", ""))[:32]:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _once(body: bytes, receive: Receive) -> Receive:
    """What the server behind receives: the body that was read, then what comes after it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, detail: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
