"""The prompts that PaliGemma was trained on, one function each.

A prompt is a string without the "\\n" that ends it: the preprocessor adds that.
"""

import re
from collections.abc import Sequence

# Of WebLI's captions, COCO-35L and XM3600: what the published models know.
LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr"),
    *("he", "hi", "hr", "hu", "id", "it", "ja", "ko", "mi", "nl", "no", "pl"),
    *("pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)

SEPARATOR = " ; "

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What separates labels, and what is a box or mask, is no part of a label.
_NO_LABEL = re.compile(r"[;\n]|<(loc|seg)\d*>")


def caption(lang: str = "en") -> str:
    """Ask for a short caption.

    Args:
        lang: str, one of `LANGUAGES`.

    Returns:
        The prompt.

    Raises:
        ValueError: the models were trained on no such code.

    Example:

    >>> caption(), caption("fr")
    ('caption en', 'caption fr')

    Source: big_vision `configs/proj/paligemma/transfers/coco35l.py`.
    """
    return f"caption {_language(lang)}"


def cap(lang: str = "en") -> str:
    """Ask for a caption as web pages have them; of `pt` models only.

    Example:

    >>> cap("de")
    'cap de'
    """
    return f"cap {_language(lang)}"


def describe(lang: str = "en") -> str:
    """Ask for a longer description; of `pt` models only.

    Example:

    >>> describe()
    'describe en'
    """
    return f"describe {_language(lang)}"


def ocr() -> str:
    """Ask for the text in the picture.

    Example:

    >>> ocr()
    'ocr'
    """
    return "ocr"


def answer(question: str, lang: str = "en") -> str:
    """Ask a question about the picture.

    Args:
        question: str, in the language of the answer.
        lang: str, one of `LANGUAGES`.

    Returns:
        The prompt.

    Raises:
        ValueError: the question is empty, or the language unknown.

    Example:

    >>> answer("where is the cow?")
    'answer en where is the cow?'
    """
    return f"answer {_language(lang)} {_text(question, 'question')}"


def question(answer: str, lang: str = "en") -> str:
    """Ask for a question that has this answer; of `pt` models only.

    Example:

    >>> question("a cow")
    'question en a cow'
    """
    return f"question {_language(lang)} {_text(answer, 'answer')}"


def detect(labels: str | Sequence[str]) -> str:
    """Ask for the boxes of all objects of some kinds.

    Args:
        labels: str, or list of them, such as "cat" or "the cat to the left".

    Returns:
        The prompt.

    Raises:
        ValueError: there is no label, or one holds what separates labels.

    Example:

    >>> detect(["cat", "dog"])
    'detect cat ; dog'
    """
    return f"detect {_labels(labels)}"


def segment(labels: str | Sequence[str]) -> str:
    """Ask for the boxes and masks of all objects of some kinds.

    Args and errors are those of `detect`.

    Example:

    >>> segment("cat")
    'segment cat'
    """
    return f"segment {_labels(labels)}"


def multiple_choice(
    question: str, options: Sequence[str], lang: str = "en"
) -> str:
    """Ask to choose one of some answers, as AI2D and A-OKVQA do.

    Args:
        question: str.
        options: list of two or more strings; the answer is one of them.
        lang: str, one of `LANGUAGES`.

    Returns:
        The prompt.

    Raises:
        ValueError: the question or an option is empty, there are too few, or
            the language is unknown.

    Example:

    >>> multiple_choice("what eats grass?", ["cow", "wolf"])
    'answer en what eats grass? choose from: cow \\t wolf'

    Source: big_vision `configs/proj/paligemma/transfers/ai2d.py`.
    """
    joined = " \t ".join(_options(options))
    return f"{answer(question, lang)} choose from: {joined}"


def science_qa(question: str, options: Sequence[str], context: str = "") -> str:
    """Ask to choose one of some answers by its letter, as ScienceQA does.

    Args:
        question: str.
        options: list of 2 to 26 strings; the answer is "The answer is A."
        context: str, what is known beside the picture; may be empty.

    Returns:
        The prompt, of four lines.

    Raises:
        ValueError: the question or an option is empty, or there are too few
            or too many.

    Example:

    >>> print(science_qa("What eats grass?", ["a cow", "a wolf"], "A meadow."))
    Question: What eats grass?
    Context: A meadow.
    Options: (A) a cow, (B) a wolf
    Answer:

    Source: big_vision `configs/proj/paligemma/transfers/science_qa.py`.
    """
    options = _options(options)
    if len(options) > len(_LETTERS):
        raise ValueError(
            f"There are more options than letters. Expected: at most "
            f"{len(_LETTERS)}. Received: {len(options)}."
        )
    lettered = ", ".join(
        f"({letter}) {option}"
        for letter, option in zip(_LETTERS, options, strict=False)
    )
    return (
        f"Question: {_text(question, 'question')}\nContext: {context}\n"
        f"Options: {lettered}\nAnswer:"
    )


def _language(lang):
    if lang not in LANGUAGES:
        raise ValueError(
            "The models were trained on no such language code. Expected: one "
            f"of {', '.join(LANGUAGES)}. Received: {lang!r}."
        )
    return lang


def _text(text, name):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"`{name}` is a string with words in it. Received: {text!r}."
        )
    return text.strip()


def _options(options):
    if isinstance(options, str) or len(options) < 2:
        raise ValueError(
            f"`options` is a list of two or more strings. Received: "
            f"{options!r}."
        )
    return [_text(option, "options") for option in options]


def _labels(labels):
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels:
        raise ValueError(
            "There is nothing to look for. Expected: one label or more. "
            "Received: none."
        )
    return SEPARATOR.join(check_label(label) for label in labels)


def check_label(label: str) -> str:
    """Refuse a label that could not be told from what is around it.

    Args:
        label: str.

    Returns:
        The label, without spaces around it.

    Raises:
        ValueError: it is empty, or holds ";", a line break or a location.

    Example:

    >>> check_label(" traffic light ")
    'traffic light'
    """
    label = _text(label, "label")
    if _NO_LABEL.search(label):
        raise ValueError(
            "A label cannot hold what separates labels. Expected: a string "
            "without ';', line breaks, <loc…> and <seg…>. Received: "
            f"{label!r}. Pass several labels as a list."
        )
    return label
