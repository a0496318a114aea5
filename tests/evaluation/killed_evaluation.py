"""Kill evaluations: `… killed_evaluation FOLDER KILLS SEED`.

Each evaluation runs in its own process, which is forked after all imports and
killed at a random moment. The last one runs to its end.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from keras_paligemma.evaluation import evaluate
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from tests.helpers.oracle import Oracle


class Slow(Oracle):
    """A slow model: 100 batches take longer than 20 killed runs together."""

    def generate(self, inputs, max_new_tokens):
        time.sleep(0.01)
        return super().generate(inputs, max_new_tokens)


def main(folder, kills, seed):
    folder, draw = Path(folder), random.Random(int(seed))
    samples = open_samples(find_benchmark("vizwizvqa"), folder / "data")
    answers = [texts[0] for texts in (s.truth["answers"] for s in samples)]
    oracle = Slow(samples, answers)

    def run(output):
        evaluate(oracle, "vizwizvqa", samples, output, batch_size=4)

    run(folder / "whole")
    lines = (folder / "whole" / "predictions.jsonl").read_bytes()
    struck = set()
    for _ in range(int(kills)):
        child = os.fork()
        if not child:
            run(folder / "killed")
            os._exit(0)
        time.sleep(draw.uniform(0.005, 0.045))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "It had ended before."
        path = folder / "killed" / "predictions.jsonl"
        struck.add(path.stat().st_size if path.exists() else 0)
    assert max(struck) < len(lines)
    run(folder / "killed")
    found = (folder / "killed" / "predictions.jsonl").read_bytes()
    assert found == lines
    print(f"{kills} kills at {len(struck)} places: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
