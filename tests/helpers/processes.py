"""What the processes that tests start inherit."""

import os
from pathlib import Path

# For a process on JAX, most of whose users have no TensorFlow. KerasHub imports
# it where it is installed, which is half of the time that such a process takes
# to start.
WITHOUT_TENSORFLOW = {
    "PYTHONPATH": os.pathsep.join(
        filter(
            None,
            [
                str(Path(__file__).parent / "without_tensorflow"),
                os.environ.get("PYTHONPATH"),
            ],
        )
    )
}
