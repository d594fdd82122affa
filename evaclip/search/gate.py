"""What stands before the service: which hosts it answers for, how large a body may be and how long it may take.

A page on the web can make a browser send requests to this machine under a name of its own (DNS rebinding); answering
only for the names that were bound stops it. A body is read whole, within its limits, before anything else looks at it.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: Any, hosts: Sequence[str] | None, max_body: int, seconds: float) -> None:
        """`hosts`: names that are answered for, None for any; `max_body`: bytes; `seconds`: to receive a body in."""
        self.app, self.hosts, self.max_body, self.seconds = app, hosts, max_body, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        if self.hosts is not None and _host(scope) not in self.hosts:
            return await _refuse(guarded, 421, "this service answers for the name that it was bound to alone")
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.seconds)
        except TimeoutError:
            return await _refuse(guarded, 408, f"the request did not arrive within {self.seconds:g} seconds")
        if body is None:
            return await _refuse(guarded, 413, f"a request may have at most {self.max_body:,} bytes")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, replayed, guarded)

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """All of it, None where it is too long."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > self.max_body:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _host(scope: Any) -> str | None:
    said = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    try:
        return urlsplit(f"//{said}").hostname
    except ValueError:
        return None


async def _refuse(send: Any, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):  # the rest of the body will not be read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
