"""Measure an export and its answers: `python -m benchmarks.export`.

Prints time, size and peak memory of an export, then the time of an answer. The
SavedModel, in a TensorFlow process, and `generate` in this process answer in
turns. All answers have full length and use the same picture and prompt. The
first call is listed separately, and later ones by their median. `--large`
replaces the nano preset by a random model of 3b's widths with few layers,
2.6 GB in float32.

The peak is the highest resident memory of this process and its children, read
from /proc ten times a second. Backends other than TensorFlow export in a
separate process. The peak includes pages of mapped files, and the imports of
both processes, which are 2 GB together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "pictures" / "scene_0.png"
TOKENIZER = ROOT / "presets" / "pali_gemma2_nano_112" / "tokenizer.model"
PROMPT = "caption en"
VISION = {"num_layers": 1}
# 3b's widths; the vocabulary is that of the included tokenizer.
TEXT = {
    "vocabulary_size": 2048,
    "num_layers": 8,
    "hidden_dim": 2304,
    "intermediate_dim": 9216,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attention_scalar": 256,
}
RUNS = 7
NEW = 16


def model(large):
    """Load the nano preset, or build a random model with large layers."""
    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma import PaliGemmaCausalLMPreprocessor
    from keras_paligemma import PaliGemmaImageConverter
    from keras_paligemma import PaliGemmaTokenizer

    if not large:
        return PaliGemmaCausalLM.from_preset("pali_gemma2_nano_112")
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER),
        PaliGemmaImageConverter(224),
        prompt_length=32,
        response_length=32,
    )
    backbone = PaliGemmaBackbone(224, VISION, TEXT, dtype="float32")
    return PaliGemmaCausalLM(backbone, preprocessor)


def resident(pid):
    """Return the resident bytes of a process and its children."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [
            child for task in tasks for child in task.read_text().split()
        ]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children))


def peak_of(function, memory=resident):
    """Run a function; return its seconds and the peak memory meanwhile."""
    most, ended = [memory(os.getpid())], threading.Event()

    def watch():
        while not ended.wait(0.1):
            most.append(memory(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    function()
    seconds = time.perf_counter() - began
    ended.set()
    thread.join()
    return seconds, max(most)


def timed(answer):
    """Return the seconds of a call, and its result."""
    began = time.perf_counter()
    answered = answer()
    return time.perf_counter() - began, answered


def serve(folder):
    """Answer each line of input with the SavedModel, in a TensorFlow process.

    Print the time of each answer and its number of tokens.
    """
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  registers its operations

    function = tf.saved_model.load(folder).signatures["serving_default"]
    inputs = {
        "images": tf.constant([PICTURE.read_bytes()]),
        "prompts": tf.constant([PROMPT]),
        "max_new_tokens": tf.constant(NEW),
        "temperature": tf.constant(0.0),
    }
    for _ in sys.stdin:
        seconds, ids = timed(lambda: function(**inputs)["token_ids"].numpy())
        print(json.dumps([seconds, int((ids != 0).sum())]), flush=True)


def by_turns(generate, folder):
    """Time `generate` and the SavedModel in turns.

    Returns:
        Two dicts of the seconds `first` and `answer`, and the number of tokens.
    """
    here, served = [], []
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.export", "--serve", folder],
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(RUNS + 1):
            here.append(timed(generate)[0])
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, tokens = json.loads(process.stdout.readline())
            served.append(seconds)
        process.stdin.close()
    return (
        *(
            {"first": seconds[0], "answer": statistics.median(seconds[1:])}
            for seconds in (here, served)
        ),
        tokens,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    from keras_paligemma.compat import to_host

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:
        folder = Path(home) / "served"
        ours = model(arguments.large)
        variables = ours.backbone.variables
        weights = sum(to_host(variable).nbytes for variable in variables)
        seconds, peak = peak_of(lambda: ours.export(folder))
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        inputs = {"images": [str(PICTURE)], "prompts": [PROMPT]}
        here, served, tokens = by_turns(
            lambda: ours.generate(inputs, max_new_tokens=NEW), folder
        )
    print(f"weights {weights / 1e9:.3f} GB, {tokens} tokens")
    print(f"export {seconds:.1f} s, peak {peak / weights:.2f} × the weights")
    print(f"size {size / weights:.3f} × the weights")
    print(f"generate {here['answer']:.3f} s, first {here['first']:.1f} s")
    print(f"served {served['answer']:.3f} s, first {served['first']:.1f} s")
    print(f"served / generate {served['answer'] / here['answer']:.2f}")


if __name__ == "__main__":
    main()
