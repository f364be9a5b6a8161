"""Who may use the server: API keys, the Host header, and headers for browsers."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError
from infer.serve.errors import ApiError
from infer.serve.options import AddressOptions

ENVIRONMENT = "GLM2_API_KEY"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Which keys open the server, if any is needed, and whether other hosts can reach it."""

    keys: tuple[str, ...] = ()
    loopback: bool = True
    _digests: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_digests", tuple(_digest(key) for key in self.keys))

    def number_of(self, key: str | None) -> int | None:
        """Return which key it is, in a time that does not depend on the keys; None if none is."""
        digest, found = _digest(key or ""), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found


def find_access(options: AddressOptions, environment: Mapping[str, str] = os.environ) -> Access:
    """Return the access that flags and environment allow; UsageError if that would be unsafe."""
    keys: tuple[str, ...] = ()
    if options.api_key_file is not None:
        keys = _read_keys(Path(options.api_key_file))
    elif ENVIRONMENT in environment:
        keys = _checked((environment[ENVIRONMENT],), ENVIRONMENT)
    loopback = _is_loopback(options.host)
    if not keys and not loopback and not options.insecure:
        raise UsageError(
            f"--host {options.host} needs an API key",
            "Everyone who can reach this machine could use the model.",
            f"Add --api-key-file FILE or set {ENVIRONMENT}; or, behind a proxy that checks "
            "clients, --insecure.",
        )
    return Access(keys, loopback and not options.insecure)


def find_origins(options: AddressOptions) -> tuple[str, ...]:
    """Return the origins whose pages may use the server; UsageError for what is no origin."""
    for given in options.cors_origin or ():
        if given == "*":
            continue
        try:
            right = _origin_of(given if "://" in given else f"https://{given}")
        except ValueError:
            right = "https://chat.example.com"
        if given != right:
            raise UsageError(
                f"--cors-origin {given} is not the origin of a web page",
                "Browsers send scheme, host and port, in lower case and without a path.",
                f"Write --cors-origin {right}",
            )
    return tuple(options.cors_origin or ())


def _origin_of(url: str) -> str:
    """Return the origin of a URL as browsers send it; ValueError if it has none."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if not re.fullmatch(r"[\w.:-]+", host, re.ASCII):
        raise ValueError
    host = f"[{host}]" if ":" in host else host
    usual = parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme))
    return f"{parts.scheme}://{host}" + ("" if usual else f":{parts.port}")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        text, mode = path.read_text("utf-8"), path.stat().st_mode
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--api-key-file {path} cannot be read", reason) from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        note(f"warning: other users of this machine can read {path}; run: chmod 600 {path}")
    return _checked(tuple(text.split("\n")), f"--api-key-file {path}")


def _checked(lines: tuple[str, ...], where: str) -> tuple[str, ...]:
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UsageError(
            f"{where} has no API key",
            "An empty key would let everyone in.",
            "Write one key a line, for example that of: openssl rand -hex 32",
        )
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"{where}: key {number} has characters that an HTTP header cannot have",
                fix="Use letters and digits.",
            )
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class KeyCheck:
    """ASGI middleware: nothing but health and the page is open without a key.

    It puts the `client` into the scope's state: whose request it is, for fairness in the queue.
    """

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._check(scope)
            if error is not None:
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> ApiError | None:
        headers, access = Headers(scope=scope), self._access
        host = (scope.get("client") or ("",))[0]
        scope.setdefault("state", {})["client"] = host
        if not access.keys:
            # A web page elsewhere could reach this machine under a name of its own (DNS rebinding).
            if access.loopback and not _is_own(headers.get("host", "")):
                return ApiError(
                    403,
                    "Without an API key only requests to localhost are answered. "
                    "Start the server with --api-key-file, or with --insecure behind a proxy.",
                    code="forbidden_host",
                )
            return None
        if _is_open(scope):
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        number = access.number_of(given)
        if number is None:
            return ApiError(
                401,
                "Missing or incorrect API key. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope["state"]["client"] = f"key {number} {host}"
        return None


def _is_own(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in _OWN_NAMES
    except ValueError:
        return False


def _is_open(scope: Scope) -> bool:
    """Return whether a request tells nothing that a key protects."""
    path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
    if path == "/health":  # unless it makes the model work
        return not parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return reads and (path == "/" or path.startswith("/static/"))
