"""Compare files of one and eight devices: `… sharded_evaluation FOLDER`."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import keras  # noqa: E402

from keras_paligemma.compat import rows_to_devices  # noqa: E402
from keras_paligemma.evaluation import evaluate  # noqa: E402
from tests.training.killed_run import set_up  # noqa: E402


def main(folder):
    folder = Path(folder)
    written = []
    for devices in (1, 8):
        distribution = keras.distribution.DataParallel(
            devices=keras.distribution.list_devices()[:devices]
        )
        keras.distribution.set_distribution(distribution)
        model, batches = set_up()
        model.preprocessor.on_long_prompt = "truncate"
        output = folder / str(devices)
        evaluate(model, "vizwizvqa", folder / "data", output, batch_size=16)
        written.append((output / "predictions.jsonl").read_bytes())
    assert written[0] == written[1]
    assert len(set(written[0].split(b"\n"))) > 20
    arrays, rows = rows_to_devices({"x": jax.numpy.zeros((16, 3))})
    assert len(arrays["x"].sharding.device_set) == 8
    assert arrays["x"].addressable_shards[0].data.shape == (2, 3)
    assert rows == slice(0, 16)
    few, _ = rows_to_devices({"x": jax.numpy.zeros((3, 3))})
    assert few["x"].shape == (3, 3)
    print("same")


if __name__ == "__main__":
    main(sys.argv[1])
