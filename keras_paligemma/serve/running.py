"""The process of a server."""

import logging
import socket

import uvicorn

from keras_paligemma.serve.limits import protocol


def run(app, host, port, limits):
    """Serve until SIGTERM or SIGINT; finish the accepted requests.

    Args:
        app: as `make_app` makes it.
        host: str.
        port: int; 0 selects a free one, which is printed.
        limits: `Limits`.
    """
    # Commands are quiet, but a server logs its failures.
    logging.disable(logging.NOTSET)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits.seconds),
        ws="none",
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listening])
