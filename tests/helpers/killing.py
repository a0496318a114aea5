"""A function that kills its process at a given call."""

import os
import signal


def counted(function, left):
    """Call a function `left[0]` times; the next call kills the process."""

    def call(*args, **kwargs):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*args, **kwargs)

    return call
