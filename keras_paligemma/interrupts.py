"""Ctrl-C in a model that trains."""

import contextlib
import signal
import threading
import traceback

# Functions in which a `KeyboardInterrupt` is dropped. Keras converts the loss
# of each step to a float if a callback asks for it, and ignores all errors
# there; JAX waits for the step in it, which is nearly all of the time. Python
# ignores the errors of a callback of garbage collection, such as JAX's.
DROPS = ("pythonify_logs", "_xla_gc_callback")


@contextlib.contextmanager
def kept_interrupts():
    """Keep a Ctrl-C that Keras or JAX drops, to raise it later.

    Yields:
        Function that raises the `KeyboardInterrupt` if there was any. It is
        also raised at the end of the block.
    """
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread receives signals, and may set their handlers.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(before):
        yield lambda: None
        return
    dropped = threading.Event()

    def handle(number, frame):
        try:
            before(number, frame)
        except KeyboardInterrupt:
            frames = traceback.walk_stack(frame)
            if any(f.f_code.co_name in DROPS for f, _ in frames):
                dropped.set()
            raise

    def check():
        if dropped.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()
