"""Caption every picture of a folder on a Ray cluster.

python examples/ray_captions.py pictures captions --workers 4

Ray distributes the pictures, runs a model on each worker, and retries the
pictures of a lost worker. All machines must be able to access the folders.
`ray.init` connects to the cluster that RAY_ADDRESS names, or starts a local
one.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import ray

from keras_paligemma import PaliGemmaCausalLM


class Captions:
    """A worker that loads the model once and answers batch after batch."""

    def __init__(self, preset, prompt, batch_size):
        self.model = PaliGemmaCausalLM.from_preset(preset)
        self.prompt, self.batch_size = prompt, batch_size

    def __call__(self, batch):
        pictures = list(batch["bytes"])
        inputs = {"images": pictures, "prompts": [self.prompt] * len(pictures)}
        # One compiled function also serves the smaller last batch.
        answers = self.model.generate(inputs, batch_size=self.batch_size)
        return {"image": batch["path"], "suffix": answers}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of pictures")
    parser.add_argument("output", help="folder of JSONL files: image, suffix")
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--prompt", default="caption en")
    parser.add_argument("--batch-size", type=int, default=8)
    # A worker takes a CPU, and reading also needs one; otherwise Ray waits
    # forever.
    parser.add_argument(
        "--workers", type=int, default=1, help="fewer than the cluster's CPUs"
    )
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    options = parser.parse_args(arguments)

    ray.init()
    pictures = ray.data.read_binary_files(
        options.folder,
        include_paths=True,
        file_extensions=["jpeg", "jpg", "png", "webp"],
    )
    captions = pictures.map_batches(
        Captions,
        fn_constructor_args=(
            options.preset,
            options.prompt,
            options.batch_size,
        ),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_gpus=options.gpus,
    )
    captions.write_json(options.output)
    ray.shutdown()


if __name__ == "__main__":
    main()
