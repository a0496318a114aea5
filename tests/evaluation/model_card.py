"""Read the tables of the model card, to write `golden/model_card.tsv`.

Run it by hand when the card changes:

    python -m tests.evaluation.model_card model_card.md

The file has a line for each number: row, column, number; or "-" if the card has
no number.
"""

import re
import sys
from pathlib import Path

FIXTURE = Path(__file__).parents[1] / "golden" / "model_card.tsv"


def numbers(card):
    """List (row, column, number) of the card's benchmark tables."""
    start = card.index("### Benchmark results")
    body = card[start : card.index("## Ethics and safety")]
    found, title, columns = [], None, None
    for line in body.splitlines():
        heading = re.match(r"\*\*\[(.+?)\]\[.+?\]\*\*", line)
        bullet = re.match(r"\* (.+), (.+): ([\d.]+)", line)
        if heading:
            title, columns = heading[1], None
        elif bullet:
            found.append((title, f"{bullet[1]}, {bullet[2]}", bullet[3]))
        elif line.startswith("|") and not re.match(r"\|[-:| ]+$", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if columns is None:
                columns = cells[1:]
                continue
            name = re.sub(r"\[(.+?)\]\[.+?\]", r"\1", cells[0])
            for column, cell in zip(columns, cells[1:], strict=True):
                # "73.8." and "19.9%" are the card's spelling.
                number = cell.rstrip(".%")
                row = (
                    (name, column)
                    if title is None
                    else (title, f"{name}, {column}")
                )
                found.append((*row, number))
    return found


def main(path):
    lines = ["\t".join(row) for row in numbers(Path(path).read_text("utf-8"))]
    FIXTURE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
