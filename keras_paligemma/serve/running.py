"""The process of a server."""

import gc
import logging
import socket

import uvicorn

from keras_paligemma.serve.protocol import protocol


def run(app, host, port, limits):
    """Serve until SIGTERM or SIGINT; finish the accepted requests.

    Args:
        app: `Guard`, from `make_app`.
        host: str.
        port: int; 0 selects a free one, which is printed.
        limits: `Limits`.

    Raises:
        SystemExit: the model could not be warmed up; the log says why.
    """
    failed = app.failed

    async def end_what_failed():
        server.should_exit = server.should_exit or failed.is_set()

    # Commands are quiet, but a server logs its errors.
    logging.disable(logging.NOTSET)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits.seconds),
        ws="none",
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        callback_notify=end_what_failed,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        # Clients may connect as soon as the address is printed; they wait.
        listening.listen(2048)
        shown = f"[{host}]" if ":" in host else host
        # The loaded objects, some 500,000, live until the end, and collecting
        # garbage among them would halt all threads.
        gc.collect()
        gc.freeze()
        print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
        server.run(sockets=[listening])
    if failed.is_set():
        raise SystemExit(1)
