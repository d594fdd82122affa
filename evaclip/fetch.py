"""Fetches one file over http(s), from public addresses only, with a limit on its size and on the time it takes.

For addresses that come from data or from a recipe, so somebody else's: a list of links must not be able to make this
machine read its own network. The name is looked up once, every address it has must be public, and the connection goes
to the very address that was checked; each redirect is checked again. Proxies are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from evaclip.errors import InputError

REDIRECTS = 5
# Seconds without a byte before the connection counts as dead, and before each new attempt.
SILENCE = 30.0
RETRY_AFTER = (1.0, 5.0, 20.0)
# Addresses of IPv6 that carry one of IPv4 in their last 32 bits (RFC 6052).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddressError(InputError):
    """An address that is not fetched from: no http(s), or not public."""


class _PassingError(Exception):
    """What may go better the next time."""


def fetch(url: str, target: Path, *, max_bytes: int, seconds: float, allow_private: bool = False) -> int:
    """Write what is at `url` to `target`; returns its size in bytes.

    `seconds`: for the whole of an attempt, however slowly the bytes come. The file has another name until it is
    complete. Raises RefusedAddressError, and InputError for what is missing, too large, too slow or cut short.
    """
    problem: Exception = _PassingError("never tried")
    for pause in (*RETRY_AFTER, None):
        temporary = target.with_name(f"{target.name}.part")
        try:
            size = _attempt(url, temporary, max_bytes, time.monotonic() + seconds, allow_private)
            temporary.replace(target)
            return size
        except (_PassingError, OSError, http.client.HTTPException) as error:
            problem = error
        finally:
            temporary.unlink(missing_ok=True)
        if pause is not None:
            time.sleep(pause)
    raise InputError(f"{url} could not be fetched: {problem or type(problem).__name__}")


def checked_addresses(url: str, allow_private: bool = False) -> list[str]:
    """The addresses that the host of `url` has, all of them public. Raises RefusedAddressError."""
    host, port = host_and_port(url)
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        raise _PassingError(f"the name {host} is not known ({error})") from None
    for address in found:
        if not allow_private and not is_public(address):
            raise RefusedAddressError(f"{url} is refused: {host} has the address {address}, which is not public")
    return found


def host_and_port(url: str) -> tuple[str, int]:
    """Host and port of an http(s) address. Raises RefusedAddressError for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RefusedAddressError(f"{url} is refused: it is no address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedAddressError(f"{url} is refused: it is not an http or https address")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def is_public(address: str) -> bool:
    """Whether an IP address, in numbers, is of the public internet, and stands for no private one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None and not is_public(str(carried)):
            return False
        if ip.ipv4_mapped:
            return True
    return ip.is_global and not ip.is_multicast


def _attempt(url: str, target: Path, max_bytes: int, deadline: float, allow_private: bool) -> int:
    for _ in range(REDIRECTS + 1):
        connection = _Connection(url, checked_addresses(url, allow_private), deadline)
        # A server that sends a byte now and then, in its headers too, never lets a socket's own timeout pass.
        ender = threading.Timer(deadline - time.monotonic(), connection.end)
        ender.start()
        try:
            parts = urlsplit(url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"User-Agent": "evaclip", "Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and (place := response.getheader("Location")):
                following = urljoin(url, place)
                if parts.scheme == "https" and urlsplit(following).scheme != "https":
                    raise RefusedAddressError(f"{url} is refused: it leads from https to {following}")
                url = following
                continue
            if response.status >= 500 or response.status == 429:
                raise _PassingError(f"the server answers {response.status} {response.reason}")
            if response.status != 200:
                raise InputError(f"{url} could not be fetched: the server answers {response.status} {response.reason}")
            return _save(response, url, target, max_bytes, deadline)
        finally:
            ender.cancel()
            connection.close()
    raise InputError(f"{url} could not be fetched: more than {REDIRECTS} redirects")


def _save(response: http.client.HTTPResponse, url: str, target: Path, max_bytes: int, deadline: float) -> int:
    expected = response.length
    if expected is not None and expected > max_bytes:
        raise InputError(f"{url} has {expected:,} bytes, more than the {max_bytes:,} that are allowed")
    size = 0
    with target.open("wb") as file:
        while data := response.read1(1 << 16):
            size += len(data)
            if size > max_bytes:
                raise InputError(f"{url} has more than the {max_bytes:,} bytes that are allowed")
            file.write(data)
    if time.monotonic() > deadline:
        raise _PassingError(f"it took too long, {size:,} bytes had come")
    if expected is not None and size != expected:
        raise _PassingError(f"the connection ended after {size:,} of {expected:,} bytes")
    return size


class _Connection(http.client.HTTPConnection):
    """A connection to an address that has been checked, whatever the name stands for by now."""

    def __init__(self, url: str, addresses: list[str], deadline: float) -> None:
        host, port = host_and_port(url)
        timeout = min(SILENCE, deadline - time.monotonic())
        if timeout <= 0:
            raise _PassingError("it took too long")
        super().__init__(host, port, timeout=timeout)
        self._addresses, self._secure = addresses, urlsplit(url).scheme == "https"
        self._opened: socket.socket | None = None  # http.client forgets `sock` as soon as the answer begins

    def connect(self) -> None:
        """Try the addresses in turn."""
        problem: OSError = OSError("it has no address")
        for address in self._addresses:
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError as error:
                problem = error
        else:
            raise problem
        self._opened = self.sock
        if self._secure:
            self.sock = self._opened = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def end(self) -> None:
        """Make whoever reads from this connection see its end; from any thread."""
        with contextlib.suppress(OSError):
            if self._opened is not None:
                self._opened.shutdown(socket.SHUT_RDWR)
