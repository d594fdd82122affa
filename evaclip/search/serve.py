"""Search over HTTP, with a page: what `evaclip serve` does."""

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import tyro

from evaclip.errors import InputError
from evaclip.log import say
from evaclip.search.index import open_index
from evaclip.search.query import Query, encoder_for, query_vector, results

# Connections beyond these are answered with 503 at once.
CONNECTIONS = 128


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Serve an index over HTTP: /search, /embed, /healthz, /openapi.json, and a page to search with."""

    index: tyro.conf.Positional[Path]
    """Folder that `evaclip embed` wrote and `evaclip index` went over."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect."""
    port: int = 8000
    """Port to listen on; 0 takes any that is free."""
    token_file: Path | None = None
    """File that holds a token; then every request but the page and /healthz must bear it."""
    model: str | None = None
    """Where the model is now, if not where it was when the collection was embedded."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    max_body: int = 12_000_000
    """Largest request in bytes."""
    max_pixels: int = 40_000_000
    """Largest image in pixels."""
    seconds: float = 30.0
    """Longest that a request may take to arrive, and again to be answered."""


def run_serve(command: ServeCommand) -> None:
    """Serve until interrupted."""
    try:
        import uvicorn

        from evaclip.search.service import Limits, create_app
    except ImportError:
        raise InputError("evaclip serve needs its packages: pip install 'evaclip[serve]'") from None
    token = _token(command.token_file)
    index = open_index(command.index)
    encoder = encoder_for(index, command.model, command.device)
    if len(index):  # the first question waits for nothing that can be made ready now
        results(index, query_vector(Query(texts=("ready",)), encoder, index)[None], 1)
    limits = Limits(max_body=command.max_body, max_pixels=command.max_pixels, seconds=command.seconds)
    listening = _listening(command.host, command.port)
    local = _is_loopback(command.host)
    hosts = ("localhost", "127.0.0.1", "::1", command.host.lower()) if local else None
    app = create_app(index, encoder, limits, token, hosts)
    host, port = listening.getsockname()[:2]
    say(f"{len(index):,} rows at http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")
    if not local:
        say("whoever reaches this machine " + ("and has the token " if token else "") + "can see what is indexed")
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", limit_concurrency=CONNECTIONS, server_header=False, lifespan="off")
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn, unless the loop had ended just then
        server.run(sockets=[listening])
    say("stopped")


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token cannot be read from {path}: {error}") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"{path} must hold a token of at least 16 printable ASCII characters, without spaces")
    return token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}; choose another with --port") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
