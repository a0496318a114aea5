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
from keras_paligemma.preprocessing.images import read_image


class Captions:
    """A worker that loads the model once and answers batch after batch."""

    def __init__(self, preset, prompt, batch_size):
        self.model = PaliGemmaCausalLM.from_preset(preset)
        self.prompt, self.batch_size = prompt, batch_size

    def __call__(self, batch):
        pictures = {}
        for path, data in zip(batch["path"], batch["bytes"], strict=True):
            try:
                pictures[path] = read_image(data, path)
            except ValueError as error:
                print(error)
        if not pictures:
            return {"image": [], "suffix": []}
        prompts = [self.prompt] * len(pictures)
        inputs = {"images": [*pictures.values()], "prompts": prompts}
        # One compiled function also serves the smaller last batch.
        answers = self.model.generate(inputs, batch_size=self.batch_size)
        return {"image": [*pictures], "suffix": answers}


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

    if os.path.isdir(options.output) and os.listdir(options.output):
        parser.error(f"{options.output} is in use, and Ray would add to it")
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
