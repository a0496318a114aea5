"""Caption every picture of a folder; the same call resumes.

python examples/caption_folder.py examples/pictures captions.jsonl
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.preprocessing.images import read_image

KINDS = {".jpeg", ".jpg", ".png", ".webp"}
BEGIN = b'{"image": "'


def read_lines(data):
    """Return the pictures of whole lines, with their prompts if known."""
    rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
    return {row["image"]: row.get("prefix") for row in rows}


def read_pictures(paths):
    """Return the pictures that can be read by path; print the errors."""
    pictures = {}
    for path in paths:
        try:
            pictures[path] = read_image(path)
        except ValueError as error:
            print(error, file=sys.stderr)
    return pictures


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "output", type=Path, help="JSONL: image, prefix, suffix"
    )
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--prompt", default="caption en")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)

    if not options.folder.is_dir():
        parser.error(f"no folder {options.folder}")
    if options.batch_size < 1:
        parser.error("--batch-size is at least 1")
    paths = sorted(
        path
        for path in options.folder.rglob("*")
        if path.suffix.lower() in KINDS
    )
    data = options.output.read_bytes() if options.output.exists() else b""
    end = data.rfind(b"\n") + 1
    try:
        done = read_lines(data[:end])
    except (KeyError, TypeError, ValueError):
        parser.error(f"{options.output} is another file")
    if not {*done.values()} <= {options.prompt, None}:
        parser.error(f"{options.output} has answers to another prompt")
    if data[end:]:
        # A kill has cut the last line, if it is one of this script.
        if data[end : end + len(BEGIN)] != BEGIN[: len(data) - end]:
            parser.error(f"{options.output} is another file")
        os.truncate(options.output, end)
    paths = [path for path in paths if str(path) not in done]
    if not paths:
        return
    model = PaliGemmaCausalLM.from_preset(options.preset)
    # Names of files may be no UTF-8; JSON can escape their bytes.
    with options.output.open("a", -1, "utf-8", "backslashreplace") as file:
        for first in range(0, len(paths), options.batch_size):
            batch = read_pictures(paths[first : first + options.batch_size])
            if not batch:
                continue
            prompts = [options.prompt] * len(batch)
            inputs = {"images": [*batch.values()], "prompts": prompts}
            # One compiled function also serves the smaller last batch.
            answers = model.generate(inputs, batch_size=options.batch_size)
            for path, answer in zip(batch, answers, strict=True):
                row = {"image": str(path), "prefix": options.prompt}
                line = json.dumps(row | {"suffix": answer}, ensure_ascii=False)
                print(line, file=file)
            file.flush()


if __name__ == "__main__":
    main()
