"""`keras-paligemma benchmarks`: list all benchmarks, or show one."""

from typing import Annotated

import typer


def benchmarks(
    action: Annotated[
        str | None, typer.Argument(help="show, to print one; default: list all")
    ] = None,
    name: Annotated[str | None, typer.Argument()] = None,
) -> None:
    """List the card's benchmarks, or show one: `benchmarks show textvqa`."""
    from keras_paligemma.evaluation import registry

    if action is None:
        for benchmark in registry.benchmarks().values():
            needs = (
                benchmark.layout
                or benchmark.tfds
                or benchmark.hugging_face
                or "own layout"
            )
            typer.echo(
                f"{benchmark.name:<20} {benchmark.title:<26} "
                f"{benchmark.metric:<18} {benchmark.split:<18} {needs}"
            )
        return
    if action != "show" or name is None:
        raise ValueError(
            "Expected: `benchmarks`, or `benchmarks show NAME`. Received: "
            f"{action!r}{'' if name is None else f' {name!r}'}."
        )
    for field, value in described(registry.find_benchmark(name)).items():
        typer.echo(f"{field:>14}  {value}")


def described(benchmark) -> dict[str, str]:
    """Return a description of a benchmark: a dict of names to text."""
    facts = {
        "name": benchmark.name,
        "card": benchmark.title,
        "prompt": repr(benchmark.prompt),
        "metric": f"{benchmark.metric}, {benchmark.value}",
        "split": benchmark.split,
        "text length": f"{benchmark.text_length} tokens",
        "decoding": (
            "greedy" if benchmark.beams == 1 else f"{benchmark.beams} beams"
        ),
    }
    if benchmark.frames:
        facts["video"] = (
            f"{benchmark.frames} frames, every {benchmark.stride}th"
        )
    if benchmark.pictures > 1:
        facts["pictures"] = str(benchmark.pictures)
    if benchmark.languages:
        facts["languages"] = " ".join(benchmark.languages)
    facts["data"] = benchmark.data
    if benchmark.layout:
        facts["layout"] = "the official archive, unpacked"
    if benchmark.tfds:
        facts["tfds"] = benchmark.tfds
    if benchmark.hugging_face:
        facts["hugging face"] = benchmark.hugging_face
    for value, numbers in benchmark.card.items():
        shown = ", ".join(f"{k} {v:g}" for k, v in numbers.items())
        facts[f"card's {value}"] = shown
    if benchmark.judges:
        facts["needs a judge"] = ", ".join(benchmark.judges)
    if benchmark.finetune:
        settings = dict(benchmark.finetune)
        larger = settings.pop("448", None)
        facts["fine-tune"] = ", ".join(f"{k} {v}" for k, v in settings.items())
        if larger:
            facts["at 448"] = ", ".join(f"{k} {v}" for k, v in larger.items())
    return facts
