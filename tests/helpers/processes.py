"""What the processes that tests start inherit."""

import os
from pathlib import Path

# For a process on JAX, most of whose users have no TensorFlow. Keras and
# KerasHub import it, matplotlib and pandas where they are installed, which is
# more than half of the time that such a process takes to start.
LEAN = {
    "PYTHONPATH": os.pathsep.join(
        filter(
            None,
            [
                str(Path(__file__).parent / "users_packages"),
                os.environ.get("PYTHONPATH"),
            ],
        )
    )
}
