"""Functions that return the prompts which PaliGemma was trained on.

Prompts do not end in "\\n": the preprocessor adds it.
"""

import re
import string
from collections.abc import Sequence

# Language codes of WebLI, COCO-35L and XM3600, on which the published models
# were trained.
LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr"),
    *("he", "hi", "hr", "hu", "id", "it", "ja", "ko", "mi", "nl", "no", "pl"),
    *("pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)

SEPARATOR = " ; "

# Between the options of a multiple choice, as in the original.
BETWEEN_OPTIONS = " \t "

# Separators of labels, and tokens of boxes and masks, are not part of a label.
_NO_LABEL = re.compile(r"[;\n]|<(loc|seg)\w*>")


def caption(lang: str = "en") -> str:
    """Return the prompt for a short caption.

    Args:
        lang: str, one of `LANGUAGES`.

    Returns:
        str, the prompt.

    Raises:
        ValueError: if the language code is unknown.

    Example:

    >>> caption(), caption("fr")
    ('caption en', 'caption fr')

    Source: big_vision `configs/proj/paligemma/transfers/coco35l.py`.
    """
    return f"caption {_language(lang)}"


def cap(lang: str = "en") -> str:
    """Return the prompt for a caption in the style of web pages.

    Only `pt` models know it. Args, Returns and Raises are those of `caption`.

    Example:

    >>> cap("de")
    'cap de'
    """
    return f"cap {_language(lang)}"


def describe(lang: str = "en") -> str:
    """Return the prompt for a longer description.

    Only `pt` models know it. Args, Returns and Raises are those of `caption`.

    Example:

    >>> describe()
    'describe en'
    """
    return f"describe {_language(lang)}"


def ocr() -> str:
    """Return the prompt for the text in the picture.

    Example:

    >>> ocr()
    'ocr'
    """
    return "ocr"


def answer(question: str, lang: str = "en") -> str:
    """Return the prompt for the answer to a question about the picture.

    Args:
        question: str, in the language of the answer.
        lang: str, one of `LANGUAGES`.

    Returns:
        str, the prompt.

    Raises:
        ValueError: if the question is empty, or the language code unknown.

    Example:

    >>> answer("where is the cow?")
    'answer en where is the cow?'
    """
    return f"answer {_language(lang)} {_text(question, 'question')}"


def question(answer: str, lang: str = "en") -> str:
    """Return the prompt for a question that has a given answer.

    Only `pt` models know it. Args, Returns and Raises are those of `answer`.

    Example:

    >>> question("a cow")
    'question en a cow'
    """
    return f"question {_language(lang)} {_text(answer, 'answer')}"


def detect(labels: str | Sequence[str]) -> str:
    """Return the prompt for the boxes of all objects of the given labels.

    Args:
        labels: str or list of str, such as "cat" or "the cat on the left".

    Returns:
        str, the prompt.

    Raises:
        ValueError: if there is no label, or one contains a separator.

    Example:

    >>> detect(["cat", "dog"])
    'detect cat ; dog'
    """
    return f"detect {_labels(labels)}"


def segment(labels: str | Sequence[str]) -> str:
    """Return the prompt for boxes and masks of all objects of the labels.

    Args, Returns and Raises are those of `detect`.

    Example:

    >>> segment("cat")
    'segment cat'
    """
    return f"segment {_labels(labels)}"


def multiple_choice(
    question: str, options: Sequence[str], lang: str = "en"
) -> str:
    """Return the prompt for a multiple choice, as in AI2D and A-OKVQA.

    Args:
        question: str.
        options: list of at least two str; the answer is one of them.
        lang: str, one of `LANGUAGES`.

    Returns:
        str, the prompt.

    Raises:
        ValueError: if the question or an option is empty, there are too few
            options, or the language code is unknown.

    Example:

    >>> multiple_choice("what eats grass?", ["cow", "wolf"])
    'answer en  what eats grass? choose from: cow \\t wolf'

    Source: big_vision `configs/proj/paligemma/transfers/ai2d.py`.
    """
    joined = BETWEEN_OPTIONS.join(_options(options))
    # Two spaces, as in the original's prompts.
    asked = f"answer {_language(lang)}  {_text(question, 'question')}"
    return f"{asked} choose from: {joined}"


def science_qa(question: str, options: Sequence[str], context: str = "") -> str:
    """Return the prompt for a multiple choice by letter, as in ScienceQA.

    Args:
        question: str.
        options: list of 2 to 26 str; the answer is "The answer is A."
        context: str, facts beside the picture; may be empty.

    Returns:
        str, the prompt, of four lines.

    Raises:
        ValueError: if the question or an option is empty, or there are too few
            or too many options.

    Example:

    >>> print(science_qa("What eats grass?", ["a cow", "a wolf"], "A meadow."))
    Question: What eats grass?
    Context: A meadow.
    Options: (A) a cow, (B) a wolf
    Answer:

    Source: big_vision `configs/proj/paligemma/transfers/science_qa.py`.
    """
    options = _options(options)
    most = len(string.ascii_uppercase)
    if len(options) > most:
        raise ValueError(
            f"There are more options than letters. Expected: at most "
            f"{most}. Received: {len(options)}."
        )
    return (
        f"Question: {_text(question, 'question')}\nContext: {context}\n"
        f"Options: {lettered(options)}\nAnswer:"
    )


def lettered(options: Sequence[str]) -> str:
    """Return up to 26 options, each with its letter, as in ScienceQA.

    Example:

    >>> lettered(["a cow", "a wolf"])
    '(A) a cow, (B) a wolf'
    """
    pairs = zip(string.ascii_uppercase, options, strict=False)
    return ", ".join(f"({letter}) {option}" for letter, option in pairs)


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
    """Return a label that is safe to write into a prompt or answer.

    Args:
        label: str.

    Returns:
        str, the label without surrounding spaces.

    Raises:
        ValueError: if it is empty, or contains ";", a line break, or a token
            of a location or mask.

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
