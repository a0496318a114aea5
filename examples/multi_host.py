"""Train on all hosts of a TPU slice; every host runs this command.

python examples/multi_host.py train.jsonl /shared/run --preset …

On a TPU the hosts find each other. Elsewhere Keras reads their addresses from
KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and
KERAS_DISTRIBUTION_PROCESS_ID. `output` is a folder that all hosts can access.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="JSONL: image, prefix, suffix")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="of all hosts"
    )
    parser.add_argument(
        "--memory-gib", type=float, help="of a chip; known of TPUs and GPUs"
    )
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(0)  # equal adapters on all hosts
    keras.distribution.initialize()  # before devices are used

    from keras_paligemma import Adam
    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma.data import Batches
    from keras_paligemma.data import JSONLSource
    from keras_paligemma.sharding import auto
    from keras_paligemma.sharding import data_shard
    from keras_paligemma.training import fit

    layout = auto(
        options.preset,
        memory_gib=options.memory_gib,
        batch_size=options.batch_size,
    )
    keras.distribution.set_distribution(layout)
    index, count = data_shard()
    if options.batch_size % count:
        parser.error(f"--batch-size is a multiple of {count}, the data's parts")
    model = PaliGemmaCausalLM.from_preset(
        options.preset, form="scanned", remat="block"
    )
    model.enable_lora(8)
    model.compile(Adam(1e-3))
    batches = Batches(
        JSONLSource(options.data),
        model.preprocessor,
        options.batch_size // count,
        shard=(index, count),
    )
    fit(model, batches, f"{options.output}/checkpoints", options.epochs)
    # Every host calls it, and the first host writes.
    model.save_adapter(f"{options.output}/adapter", base=options.preset)


if __name__ == "__main__":
    main()
