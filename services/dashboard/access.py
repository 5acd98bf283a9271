"""Who may read, and what a browser may do with what it reads: plain ASGI, around the whole application.

Without a token only requests that name this machine as loopback are answered, so that a web page cannot reach the
server under a name of its own (DNS rebinding). With a token everybody sends it: programs as `Authorization: Bearer`,
people once in a form, for which their browser keeps a cookie that is not the token. It stands in no address.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
COOKIE = "raylign_dashboard"
LOGIN_PATH = "/login"
MIN_TOKEN = 16
"""Characters of a token at least: it can be tried without end."""
_OPEN_PATHS = ("/login", "/static/style.css", "/static/icon.svg")

SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """The door in front of an application. `token` None lets in who names a loopback host."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                kept = _path(scope).startswith("/static/")  # asked for again, and not sent again if unchanged
                headers.setdefault("cache-control", "no-cache" if kept else "no-store")
            await send(message)

        refused = self._refusal(scope)
        await (refused or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        path = _path(scope)
        if self._token is None:
            host = _host_name(headers.get("host", ""))
            return None if host in LOOPBACK_NAMES else PlainTextResponse("this server answers on loopback only", 400)
        if path in _OPEN_PATHS or is_allowed(headers, self._token):
            return None
        if path in ("/", ""):
            return RedirectResponse(f"{scope.get('root_path', '')}{LOGIN_PATH}", 303)
        return JSONResponse({"error": "send the token: Authorization: Bearer TOKEN, or log in"}, 401)


def is_allowed(headers: Headers, token: str) -> bool:
    """Whether a request brings the token, or the cookie that logging in gave. Both are compared in constant time."""
    given = headers.get("authorization", "")
    if given:
        return same(given, f"Bearer {token}")
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return cookie is not None and same(cookie.value, session_of(token))


def session_of(token: str) -> str:
    """What the cookie holds: proof of the token, from which the token cannot be had."""
    return hmac.new(token.encode(), b"raylign dashboard session", hashlib.sha256).hexdigest()


def same(given: str, wanted: str) -> bool:
    """Equality that takes as long for a near miss as for a far one."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode())


def session_cookie(token: str, secure: bool, path: str) -> str:
    """The header that gives a browser its cookie: no script reads it, no other site sends it."""
    parts = [f"{COOKIE}={session_of(token)}", "HttpOnly", "SameSite=Strict", f"Path={path or '/'}", "Max-Age=604800"]
    return "; ".join([*parts, "Secure"] if secure else parts)


def _path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if root else path


def _host_name(host: str) -> str:
    """The host without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.rpartition(":")[0] or host
