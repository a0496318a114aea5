"""The report of a run: values beside the card's, and the worst answers."""

import base64
import html
import io
import json
import math

from PIL import Image

from keras_paligemma.atomic import whole_file
from keras_paligemma.metrics.judges import JUDGES
from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.drawing import draw_objects

# The longer side of a picture in the report, pixels.
_SIDE = 320
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem;
  text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
figure {{ display: inline-block; vertical-align: top; width: 20rem;
  margin: .6rem; }}
img {{ max-width: 100%; }}
figcaption {{ overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<table><tr><th>value</th><th>ours</th><th>95 % interval</th><th>card</th></tr>
{rows}
</table>
<h2>The worst answers</h2>
{figures}
</body></html>
"""


def write_report(result, samples, predictions, worst) -> None:
    """Write `results.json` and `report.html` of a run.

    Args:
        result: `Evaluation`.
        samples: `Samples`.
        predictions: dict of ids to texts.
        worst: list of int, indices of the samples to show.
    """
    facts = _facts(result) | {"worst": [samples.ids[row] for row in worst]}
    _write(result.output / "results.json", json.dumps(facts, indent=2) + "\n")
    page = _PAGE.format(
        title=html.escape(result.benchmark.title),
        facts=html.escape("; ".join(_about(result)) + "."),
        rows="\n".join(_rows(result)),
        figures="\n".join(
            _figure(samples[row], predictions[samples.ids[row]])
            for row in worst
        ),
    )
    _write(result.output / "report.html", page)


def _facts(result):
    """Return the result for JSON, which has no nan."""
    benchmark = result.benchmark
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": benchmark.split,
        "samples": result.samples,
        "first_samples_only": result.limited,
        "metric": benchmark.metric,
        "value": benchmark.value,
        "card_column": result.column,
        "values": {k: _number(v) for k, v in result.values.items()},
        "intervals": {
            k: [_number(bound) for bound in v]
            for k, v in result.intervals.items()
        },
        "card": dict(result.card),
    }


def _about(result):
    """Yield what the report's first paragraph says."""
    yield f"{result.samples:,} samples of the split {result.benchmark.split}"
    yield f"prompt {result.benchmark.prompt!r}"
    if result.card:
        yield f"beside the card's {result.column}"
    else:
        yield "of which the card has no number"
    if result.limited:
        yield "the first samples alone, which the card's number is not of"


def _rows(result):
    """Yield the HTML of each value's row."""
    for name, value in result.values.items():
        low, high = result.intervals[name]
        cells = [name, f"{value:.2f}", f"{low:.2f} to {high:.2f}"]
        cells.append(f"{result.card[name]:g}" if name in result.card else "")
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        yield f"<tr>{cells}</tr>"
    for name in result.unjudged:
        first, second = map(
            html.escape, (name, f"needs a judge, {JUDGES[name]}")
        )
        yield f'<tr><td>{first}</td><td colspan="3">{second}</td></tr>'


def _figure(sample, text):
    """Return the HTML of one prediction, with its boxes in the picture."""
    several = isinstance(sample.images, (list, tuple))
    pictures = sample.images if several else [sample.images]
    objects = read_objects(text)
    shown = []
    for picture in pictures[:4]:
        seen = Image.fromarray(read_image(picture))
        if objects and not several:
            seen = draw_objects(seen, objects)
        shown.append(f'<img alt="" src="{_embedded(seen)}">')
    right = json.dumps(
        {
            name: value
            for name, value in sample.truth.items()
            if isinstance(value, (str, int, float, list))
        },
        ensure_ascii=False,
        default=str,
    )
    return (
        f"<figure>{''.join(shown)}<figcaption><b>{html.escape(sample.id)}</b>"
        f"<br>{html.escape(sample.prompt)}<br>answer: "
        f"<b>{html.escape(text) or '(none)'}</b><br>"
        f"right: {html.escape(right[:600])}"
        "</figcaption></figure>"
    )


def _embedded(picture):
    """Return a thumbnail as a data URI, so that the page is one file."""
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/jpeg;base64,{data}"


def _number(value):
    return None if math.isnan(value) else value


def _write(path, text):
    # A model can write half of a character, which is not valid UTF-8.
    with whole_file(path) as draft:
        draft.write_bytes(text.encode("utf-8", "backslashreplace"))
