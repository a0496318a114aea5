"""Train adapters on a 4-bit base; use them on the unquantized model.

python examples/qlora.py examples/finetune/train.jsonl runs/qlora
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.data import Batches
from keras_paligemma.data import JSONLSource
from keras_paligemma.training import fit


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="JSONL: image, prefix, suffix")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--quantize", default="int4", help="int4 | int8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(0)
    model = PaliGemmaCausalLM.from_preset(
        options.preset,
        quantize=options.quantize,
        form="scanned",
        remat="block",
    )
    model.enable_lora(16, targets="decoder")
    model.compile(Adam(options.learning_rate))
    source = JSONLSource(options.data)
    batches = Batches(source, model.preprocessor, options.batch_size)
    fit(model, batches, f"{options.output}/checkpoints", options.epochs)
    adapter = f"{options.output}/adapter"
    model.save_adapter(adapter, base=options.preset)

    # The base in its own dtype: the adapters fit both models.
    whole = PaliGemmaCausalLM.from_preset(options.preset)
    whole.load_adapter(adapter)
    whole.adapters.merge()
    whole.save_to_preset(f"{options.output}/preset")
    example = source[0]
    inputs = {key: example[key] for key in ("images", "prompts")}
    print(example["prompts"], "->", whole.generate(inputs))


if __name__ == "__main__":
    main()
