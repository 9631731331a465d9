"""What keeps other web pages out: checks of Host, Origin and token, and the headers of every answer.

A page that a browser loads from elsewhere cannot read answers of this server, but it could send requests to it (cross
site), or have its own name point to this machine (DNS rebinding). A rebound name is never an address, so addresses and
the names given pass; whatever changes anything needs the page's own Origin and a token that only its pages hold.
"""

import ipaddress
import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE = {"GET", "HEAD", "OPTIONS"}
_PLOTLY_STYLE = (
    "sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o="  # the one that Plotly's code brings along for maps
)
_HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src 'self'; style-src 'self' '{_PLOTLY_STYLE}'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with `no-referrer` a form of the page itself comes from the origin `null`
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Refuses requests with a foreign Host or Origin, and sets the headers of every answer.

    Args:
        app: What it guards.
        hosts: Names that the Host header may have besides addresses and `localhost`; none for no check of the Host,
            where a server around this one has its own.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app = app
        self._hosts = None if hosts is None else {"localhost", *(name.lower() for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and not self._known(host):
            await PlainTextResponse("this server is not known by that name", 403)(scope, receive, send_with_headers)
        elif scope["method"] not in _SAFE and not _same_origin(headers.get("origin", ""), host):
            await PlainTextResponse("only this page itself may ask for that", 403)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _known(self, host: str) -> bool:
        assert self._hosts is not None
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _same_origin(origin: str, host: str) -> bool:
    return bool(host) and urlsplit(origin).netloc == host and urlsplit(origin).scheme in ("http", "https")


def new_token() -> str:
    """A token that other pages cannot guess."""
    return secrets.token_urlsafe(32)


def is_token(given: str, token: str) -> bool:
    """Whether a form came with the token, compared in constant time."""
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), token.encode())
