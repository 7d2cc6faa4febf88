"""Addresses of servers that a recipe names: which are refused, and how an address is shown without its passwords.

One check for the teacher's server and the S3 server: http(s), no password, no cloud metadata service, whatever notation
hides it (names, numbers, IPv4 inside IPv6). One way to show an address, used wherever one is printed or recorded.
"""

import ipaddress
import re
import socket
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from kd_core.errors import RecipeError

__all__ = ["check_address", "hide_passwords", "holds_password", "redact_url"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"})
_METADATA_ADDRESSES = frozenset(  # beside the link-local ones: EC2 and Google over IPv6, Alibaba, Oracle, Azure
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"))
)
_IPV4_IN_LAST_BITS = tuple(  # NAT64 (well-known and local), mapped, translated and compatible addresses
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0/96", "::ffff:0:0:0/96", "::/96"))
)
_SECRET_FIELD = re.compile(r"pass|pwd|secret|token|key|credential|signature|^sig$|^auth", re.IGNORECASE)
_HOST = re.compile(r"[^/?#]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def check_address(url: str, *, field: str, instead: str) -> str:
    """The address without a trailing slash, or a refusal.

    A name is resolved and every address it stands for is checked; a name that does not resolve here is left to the
    request itself (a proxy may know it).

    Args:
        url: what the recipe says.
        field: its place in the recipe, for messages.
        instead: where a password belongs, for messages.

    Raises:
        RecipeError: not http(s), no host, a password in it, or a link-local or metadata address.

    >>> check_address("http://127.0.0.1:8000/v1/", field="run.teacher_url", instead="KD_TEACHER_API_KEY")
    'http://127.0.0.1:8000/v1'
    """
    shown = redact_url(url)
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError as error:
        raise RecipeError(f"{field}: {shown!r} is not an address; use one like http://127.0.0.1:8000") from error
    if parts.username is not None or parts.password is not None or holds_password(url):
        raise RecipeError(f"{field}: the address of host {host!r} carries a password; put it into {instead} instead")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise RecipeError(f"{field}: {shown!r} is refused; use a plain address like http://127.0.0.1:8000 (http or https, no query)")
    if host in _METADATA_HOSTS:
        raise RecipeError(f"{field}: {shown} is a cloud metadata service; name the server itself")
    for address in _resolved(host, port or 443):
        for meant in (address, *_embedded(address)):
            if meant.is_link_local or meant.is_multicast or meant in _METADATA_ADDRESSES:
                raise RecipeError(
                    f"{field}: {shown} is the link-local, multicast or metadata address {meant}; name the server's own address"
                )
    return url.rstrip("/")


def _resolved(host: str, port: int) -> list[IPAddress]:
    try:
        infos = socket.getaddrinfo(host.split("%")[0], port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: no name that DNS could know
        return []
    return [ipaddress.ip_address(str(info[4][0]).split("%")[0]) for info in infos]


def _embedded(address: IPAddress) -> Iterator[ipaddress.IPv4Address]:
    """IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    if any(address in network for network in _IPV4_IN_LAST_BITS):
        yield ipaddress.IPv4Address(address.packed[-4:])
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo


# ---------------------------------------------------------------------------------------------- passwords


def holds_password(url: str) -> bool:
    """Whether an address carries a password: before an @, or as a field of its query.

    >>> holds_password("postgresql://me:pw@host/db"), holds_password("postgresql://host/db?password=pw")
    (True, True)
    >>> holds_password("postgresql://me@host/db?sslmode=require"), holds_password("sqlite:///.kd/mlflow.db")
    (False, False)
    """
    _, _, rest = url.partition("://")
    host, query = _HOST.match(rest)[0], rest.partition("?")[2].partition("#")[0]  # type: ignore[index]
    user, at, _ = host.rpartition("@")
    cut = not at and "@" in rest and not re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host)  # a password that holds a slash ends the host early
    return ":" in user or cut or any(_SECRET_FIELD.search(part.partition("=")[0]) for part in query.split("&"))


def redact_url(url: str) -> str:
    """An address as it may be shown: without user and password, and without the values of its query.

    It rather hides too much: a password may hold any sign, an @ or a slash as well.

    >>> redact_url("postgresql://me:p@ss@host:5432/db?password=x@y&sslmode=require")
    'postgresql://host:5432/db?password=***&sslmode=***'
    >>> redact_url("http://127.0.0.1:8000/v1")
    'http://127.0.0.1:8000/v1'
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    head, mark, query = rest.partition("?")
    if ":" in head and "@" not in head and "@" in query:  # perhaps the password itself holds a question mark
        return f"{scheme}://***"
    head = head.rpartition("@")[2]
    fields = "&".join(f"{name}=***" if equals else "***" for name, equals, _ in (part.partition("=") for part in query.split("&")))
    return f"{scheme}://{head}{mark}{fields if mark else ''}"


def hide_passwords(text: str, *urls: str) -> str:
    """Text that others wrote, with addresses that hold a password redacted; the passwords of ``urls`` are hidden wherever they stand.

    >>> hide_passwords("cannot connect to http://me:pw@host/x: pw is wrong", "http://me:pw@host")
    'cannot connect to http://host/x: *** is wrong'
    """
    for url in urls:
        text = text.replace(url, redact_url(url))
    text = _URL.sub(lambda found: redact_url(found[0]) if holds_password(found[0]) else found[0], text)
    for secret in sorted({secret for url in urls for secret in _secrets(url)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(url: str) -> Iterator[str]:
    """Passwords of an address, as they are written and as they are meant."""
    _, _, rest = url.partition("://")
    head, _, query = rest.partition("?")
    password = head.rpartition("@")[0].partition(":")[2]
    values = [password, *(part.partition("=")[2] for part in query.split("&") if _SECRET_FIELD.search(part.partition("=")[0]))]
    for value in filter(None, values):
        yield value
        yield unquote(value)
