"""HTTP/1.1 connections: what is invalid, and how long they may wait."""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Maximum bytes of a request's headers, or between two parts of its body.
HEAD = 65536
# Seconds to read the rest of a refused request.
LINGERS = 30
STATUSES = {400: "Bad Request", 505: "HTTP Version Not Supported"}


def protocol(seconds):
    """Return uvicorn's protocol class that drops connections without request.

    Bytes that are not HTTP get a 400, and the rest of them is read: closing a
    connection with unread bytes would discard the reply. Requests before them
    are answered first. The parser has no limit for headers, so this class has
    one. A request to change the protocol is answered in this one. A client that
    does not read its reply is disconnected, so that it cannot block others.

    Args:
        seconds: float, maximum time from the connection, or from the previous
            reply, to the end of a request's headers; and for which a client
            may leave a full buffer, or its last reply, unread.
    """

    class Protocol(HttpToolsProtocol):
        # Timers: until a request must have come, until there must be room for
        # more of a reply, and until the end of a connection that is closed.
        waits = None
        unwritten = None
        closes = None
        refused = False
        # Status and text of a reply that waits for the replies before it.
        invalid = None
        # Bytes since the last part of a body, or the last request.
        unread = 0

        def connection_made(self, transport):
            super().connection_made(transport)
            self._wait()

        def data_received(self, data):
            if self.refused or self.invalid:
                return
            self._unset_keepalive_if_required()
            while data:
                self.unread += len(data)
                try:
                    self.parser.feed_data(data)
                    data = b""
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._without_upgrade(data[upgrade.args[0] :])
                except httptools.HttpParserError as error:
                    version = str(error) == "Invalid HTTP version"
                    return self._refuse(505 if version else 400, str(error))
            if self.unread > HEAD:
                self._refuse(400, f"Expected: headers of {HEAD} bytes.")

        def on_headers_complete(self):
            if not self.parser.should_upgrade():
                super().on_headers_complete()

        def on_body(self, body):
            self.unread = 0
            super().on_body(body)

        def on_message_complete(self):
            self.unread = 0
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def on_response_complete(self):
            # The base method continues with a request that has already arrived.
            self._wait()
            super().on_response_complete()
            # It also reads on, so requests would pile up that each wait.
            if self.pipeline:
                self.flow.pause_reading()
            if self.transport.is_closing():
                self._end()
            elif self.invalid:
                self._refuse(*self.invalid)

        def connection_lost(self, exc):
            super().connection_lost(exc)
            for timer in (self.waits, self.unwritten, self.closes):
                if timer is not None:
                    timer.cancel()

        def shutdown(self):
            super().shutdown()
            if self.transport.is_closing():
                self._end()

        def timeout_keep_alive_handler(self):
            super().timeout_keep_alive_handler()
            if self.transport.is_closing():
                self._end()

        def pause_writing(self):
            super().pause_writing()
            self.unwritten = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            if self.unwritten is not None:
                self.unwritten.cancel()

        def _without_upgrade(self, rest):
            """Return a request to parse again, which keeps this protocol.

            The parser leaves the body unread, which clients send nevertheless.
            """
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refuse(400, "This is no proxy.")
                return b""
            version = self.parser.get_http_version().encode()
            head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
            head += [
                b"%b: %b\r\n" % header
                for header in self.headers
                if header[0] != b"upgrade"
            ]
            self.parser = httptools.HttpRequestParser(self)
            return b"".join(head) + b"\r\n" + rest

        def _refuse(self, status, message):
            cycle = self.cycle
            answering = cycle is not None and not cycle.response_complete
            if self.pipeline or (answering and not cycle.more_body):
                self.invalid = status, message
                return
            self.refused = True
            if answering:
                # The end of its body is unknown.
                cycle.disconnected = True
                cycle.message_event.set()
            if not (answering and cycle.response_started):
                self.transport.write(
                    f"HTTP/1.1 {status} {STATUSES[status]}\r\n"
                    "Content-Type: text/plain\r\nConnection: close\r\n\r\n"
                    f"{message}".encode()
                )
            # The client sees the end of the reply and closes in turn.
            self.transport.write_eof()
            self._wait(LINGERS)

        def _wait(self, seconds=seconds):
            if self.waits is not None:
                self.waits.cancel()
            self.waits = self.loop.call_later(seconds, self._let_go, self.cycle)

        def _let_go(self, last):
            # The last request may have been sent before the reply to another.
            answering = last is not None and not last.response_complete
            if self.cycle is last and (self.refused or not answering):
                self._end()

        def _end(self):
            """Close the connection; what is unread may delay it, but ends."""
            self.transport.close()
            if self.closes is None:
                self.closes = self.loop.call_later(
                    seconds, self.transport.abort
                )

    return Protocol
