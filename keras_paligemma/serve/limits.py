"""Limits on requests: sizes, times, origins and tokens."""

import asyncio
import contextlib
import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from keras_paligemma.serve.protocol import LINGERS
from keras_paligemma.serve.requests import Refused

log = logging.getLogger("keras_paligemma.serve")

OPEN = ("/healthz", "/readyz")
# The longest pause in the rest of a refused request, in seconds.
QUIET = 1
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware that rejects invalid requests and counts them all.

    It reads the body, since it limits it, and gives it to the application in
    the scope.

    Args:
        app: ASGI application; it may raise `Refused` and `HTTPException`.
        limits: `Limits`.
        metrics: `Metrics`.
        posts: strs, paths that take a JSON body by POST.
        gets: strs, the other paths.
        token: str, the bearer token that requests must carry, or `None`.
        hosts: strs, names of the server; `None` accepts any. This prevents
            DNS rebinding, where a page's requests have another host name.
        failed: `threading.Event`, set when the server cannot go on.
    """

    def __init__(
        self,
        app,
        limits,
        metrics,
        posts,
        gets,
        token=None,
        hosts=None,
        failed=None,
    ):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.posts = posts
        # These have a label of their own in the metrics.
        self.paths = [*posts, *gets]
        self.token = token
        self.hosts = hosts
        self.failed = failed

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        started = time.monotonic()
        status: list[int | None] = [None]

        async def sending(message):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except Disconnected:
            status[0] = 499
        except Exception as error:  # noqa: BLE001  keeps serving
            log.exception("a request failed")
            if status[0] is None:
                reply = refusal(scope["path"], Refused.of(error))
                await reply(scope, receive, sending)
        finally:
            self.metrics.requests.labels(path, str(status[0])).inc()
            self.metrics.latency.labels(path).observe(
                time.monotonic() - started
            )

    async def _answer(self, scope, receive, send):
        try:
            headers = {
                name.decode("latin-1"): value.decode("latin-1")
                for name, value in scope["headers"]
            }
            self._check(scope, headers)
            scope["body"] = await self._body(scope, headers, receive)
        except Refused as error:
            return await _refuse(error, scope, receive, send)
        # Without an application, the router would answer 404 itself.
        scope["app"] = self.app
        try:
            return await self.app(scope, receive, send)
        except Refused as error:
            refused = error
        except HTTPException as error:
            message = f"{error.detail}. Expected: {', '.join(self.paths)}."
            refused = Refused(error.status_code, message, headers=error.headers)
        await refusal(scope["path"], refused)(scope, receive, send)

    def _check(self, scope, headers):
        if scope["http_version"] not in ("1.0", "1.1", "2"):
            raise Refused(505, "Expected: HTTP/1.1.")
        hosts = [name for name, _ in scope["headers"]].count(b"host")
        if hosts > 1 or hosts == 0 and scope["http_version"] != "1.0":
            raise Refused(400, f"Expected: one Host header. Received: {hosts}.")
        host = headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            raise Refused(421, f"Unknown host {host[:60]!r}.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("//")[2] != host:
            raise Refused(403, "Pages of other sites may not ask.")
        if self.token and scope["path"] not in (*OPEN, "/"):
            given = headers.get("authorization", "")
            wanted = f"Bearer {self.token}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                raise Refused(
                    401,
                    "Expected: Authorization: Bearer, and the token.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] == "POST" and scope["path"] in self.posts:
            kind = headers.get("content-type", "").partition(";")[0]
            if kind.strip().lower() != "application/json":
                raise Refused(415, "Expected: Content-Type: application/json.")
            if headers.get("content-encoding", "identity") != "identity":
                raise Refused(415, "Expected: a body that is not compressed.")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 20:
            raise Refused(400, f"Not a length: {length[:40]!r}.")
        self._check_size(int(length))

    def _check_size(self, size):
        if size > self.limits.body:
            raise Refused(413, f"Expected: at most {self.limits.body} bytes.")

    async def _body(self, scope, headers, receive):
        """Read a body, chunked or not, within the limits."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    part = message.get("body", b"")
                    size += len(part)
                    self._check_size(size)
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise Refused(408, "The body came too slowly.") from error
        return b"".join(parts)


async def _refuse(error, scope, receive, send):
    """Refuse a request whose body is not read, and end its connection.

    A client that is still sending does not read the reply, and loses it if the
    connection is closed. So the connection is closed after the end of the
    body, or when no more data arrives.
    """
    reply = refusal(scope["path"], error)
    # Unread bytes would be taken for the next request.
    reply.headers["Connection"] = "close"

    async def begin(message):
        if message["type"] == "http.response.body":
            message = message | {"more_body": True}
        await send(message)

    await reply(scope, receive, begin)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGERS):
            more = True
            while more:
                async with asyncio.timeout(QUIET):
                    more = (await receive()).get("more_body", False)
    await send({"type": "http.response.body", "body": b""})


class Disconnected(Exception):
    """The client disconnected before its request was complete."""


def _hostname(host):
    """Return the name in a Host header, without port; `None` if it has none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def refusal(path, error):
    """Return a `Refused` in the format of the requested API."""
    content = {"error": str(error)}
    if path.startswith("/v1/"):
        content = {"error": openai_error(error)}
    return JSONResponse(content, error.status, headers=error.headers)


def openai_error(error):
    """Return the content of an error in OpenAI's format."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    if error.status >= 500:
        kind = "server_error"
    return {
        "message": str(error),
        "type": kind,
        "param": error.field,
        "code": None,
    }
