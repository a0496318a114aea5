"""Conversion of users' inputs to NumPy arrays, strings and numbers."""

import operator
import re
import warnings
from collections.abc import Sequence

import numpy as np

# Special tokens that appear as text in transformers' snippets and in the
# prompts that the original prints. SentencePiece would split them into letters.
# TensorFlow uses these patterns too.
SPECIAL_TOKEN = r"<(?:image|bos|eos)>"
DROPPED = "A prompt begins with <image> or <bos>, which was dropped."
LEADING_TOKENS = r"^[ \t\r\n]*(?:<(?:image|bos)>[ \t\r\n]*)+"
TEXT_ALONE = (
    "Expected: text alone, since the preprocessor adds image tokens, bos, "
    "separator and eos. "
)


def to_numpy(x) -> np.ndarray:
    """Convert an array, or a tensor of any framework, to NumPy.

    Preprocessing runs in NumPy whatever the backend, so that a JAX or Torch
    training loop runs no TensorFlow.

    Args:
        x: array, eager tensor, number or nested list of numbers.

    Returns:
        NumPy array.

    Raises:
        ValueError: `x` is a symbolic tensor, as inside `tf.data` maps.

    Example:

    >>> to_numpy([1, 2]).shape
    (2,)
    """
    try:
        return np.asarray(x)
    except NotImplementedError as error:
        # TensorFlow's error for the values of a symbolic tensor.
        raise ValueError(
            "Preprocessing runs in NumPy, not in a TensorFlow graph. "
            "Expected: arrays, strings or eager tensors. Received: a symbolic "
            f"tensor, {x}. The preprocessor itself can be mapped, "
            "`dataset.map(preprocessor)`, and `fit` takes raw batches; for "
            "another part write `dataset.map(lambda x: tf.numpy_function("
            "part, [x], dtype))`."
        ) from error
    except (TypeError, RuntimeError):
        if not hasattr(x, "detach"):
            raise
        # A tensor of Torch on a GPU, in bfloat16 or with a gradient, whatever
        # the backend.
        x = x.detach().cpu()
        return np.asarray(x.float() if "bfloat16" in str(x.dtype) else x)


def to_pictures(images) -> tuple[list, bool]:
    """Return pictures as a list, however many there are.

    Args:
        images: a picture, or a list, tuple or column of them, such as a Pandas
            series or an array of paths; or an array of rank 4.

    Returns:
        `(pictures, several)`: a list, and `False` if `images` is one picture.

    Raises:
        ValueError: there is no picture, as after `cv2.imread` of a missing
            file.

    Example:

    >>> to_pictures(np.array(["cat.jpg", "dog.jpg"]))[1]
    True
    """
    # A column has rank 1, a picture 2 or 3.
    several = is_list(images) or getattr(images, "ndim", 3) in (1, 4)
    pictures = list(images) if several else [images]
    if not pictures or any(picture is None for picture in pictures):
        raise ValueError(
            "A picture is missing. Expected: one or more pictures. Received: "
            f"{'none' if not pictures else 'None'}, which `cv2.imread` returns "
            "for a file that is missing. For text alone, call `generate` with "
            "'images': None."
        )
    return pictures, several


def is_list(x) -> bool:
    """Return whether a value is a list, tuple or other sequence, but no text.

    Args:
        x: any value, such as a column of a data set of Hugging Face.

    Example:

    >>> is_list(range(3)), is_list(b"cat")
    (True, False)
    """
    return isinstance(x, Sequence) and not isinstance(
        x, (str, bytes, bytearray)
    )


def to_strings(x, name: str) -> tuple[list[str], bool]:
    """Convert text to a list of strings.

    Args:
        x: a string, UTF-8 bytes, or a list, tuple, array or eager tensor of
            them.
        name: str, name of `x` in errors.

    Returns:
        `(strings, batched)`: list of str, and `False` if `x` is one string.

    Raises:
        ValueError: an element is not text, not UTF-8, or has a lone
            surrogate, which no Unicode text has; or `x` is empty.

    Example:

    >>> to_strings(b"caption en", "prompts")
    (['caption en'], False)
    """
    if not isinstance(x, (str, bytes, list, tuple)):
        x = to_numpy(x).tolist()
    batched = isinstance(x, (list, tuple))
    if batched and not x:
        raise ValueError(
            f"`{name}` is empty. Expected: at least one string. Received: {x}."
        )
    strings = [
        _to_string(s, name, i) for i, s in enumerate(x if batched else [x])
    ]
    return strings, batched


def _to_string(x, name, index):
    if not isinstance(x, (str, bytes)):
        x = to_numpy(x).tolist()
    if isinstance(x, bytes):
        try:
            x = x.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`{name}` holds bytes that are not UTF-8. Expected: strings "
                f"or UTF-8 bytes. Received: {x[:40]!r} at index {index}. "
                "Decode them with their own encoding first."
            ) from error
    if not isinstance(x, str):
        raise ValueError(
            f"`{name}` holds something that is not text. Expected: a string "
            f"or a list of strings. Received: {x!r} of type "
            f"{type(x).__name__} at index {index}."
        )
    try:
        x.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` holds half of a character, a lone surrogate. Expected: "
            f"Unicode text. Received: {x[error.start]!r} at character "
            f"{error.start} of {x!r:.80} at index {index}. Remove it, or "
            "replace it by '?': text.encode('utf-8', 'replace').decode()."
        ) from error
    return x


def prompt_text(prompt: str) -> str:
    """Return a prompt without the tokens that the layout adds itself.

    Args:
        prompt: str.

    Returns:
        str without leading `<image>` and `<bos>`, the blanks around them, and
        one newline at the end.

    Example:

    >>> prompt_text("<image> caption en\\n")
    'caption en'
    """
    return re.sub(LEADING_TOKENS, "", prompt).removesuffix("\n")


def plain_prompts(prompts: list[str]) -> list[str]:
    """Return the `prompt_text` of each prompt.

    Warns if `<image>` or `<bos>` were dropped.

    Args:
        prompts: list of str.

    Returns:
        list of str.

    Raises:
        ValueError: a special token at another place, or `<eos>`.

    Example:

    >>> plain_prompts(["caption en"])
    ['caption en']
    """
    runs = [re.match(LEADING_TOKENS, prompt) for prompt in prompts]
    check_no_special_tokens(
        prompts, "prompts", [run.end() if run else 0 for run in runs]
    )
    if any(runs):
        # Without a number in its text, Python shows the warning only once.
        warnings.warn(
            f"{DROPPED} {TEXT_ALONE}Remove it from the prompts.",
            stacklevel=2,
        )
    return [prompt_text(prompt) for prompt in prompts]


def check_no_special_tokens(
    strings: list[str], name: str, starts: list[int] | None = None
) -> None:
    """Raise `ValueError` if a string has `<image>`, `<bos>` or `<eos>`.

    Args:
        strings: list of str.
        name: str, name of the strings in errors.
        starts: list of int, the first character of each string that is
            checked, or `None` for 0.

    Raises:
        ValueError: a string holds a special token; the error has its position.

    Example:

    >>> check_no_special_tokens(["a cat"], "responses")
    """
    pattern = re.compile(SPECIAL_TOKEN)
    starts = starts or [0] * len(strings)
    for index, (text, start) in enumerate(zip(strings, starts, strict=True)):
        found = pattern.search(text, start)
        if found:
            raise ValueError(
                f"`{name}` holds a special token. {TEXT_ALONE}Received: "
                f"{found[0]} at character {found.start()} of {text!r:.80} at "
                f"index {index}. Remove it."
            )


def check_dictionary(x) -> None:
    """Raise `ValueError` unless inputs are a dict; it shows how to make one.

    Args:
        x: inputs of a preprocessor or a model.

    Raises:
        ValueError: `x` is not a dict.

    Example:

    >>> check_dictionary({"prompts": "caption en"})
    """
    if isinstance(x, dict):
        return
    fix = ""
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], dict):
        fix = (
            " One dictionary of lists: "
            "{key: [row[key] for row in inputs] for key in inputs[0]}."
        )
    received = f" {x!r:.80}" if isinstance(x, (str, bytes)) else ""
    raise ValueError(
        "Inputs are one dictionary. Expected: {'images': …, 'prompts': …}, "
        "one picture and one string or lists of them, and 'responses' to "
        f"train. Received: {type(x).__name__}{received}.{fix}"
    )


def to_integer(x, name: str, least: int = 1, most: int | None = None) -> int:
    """Convert a count, such as a number of tokens, to a Python int.

    Args:
        x: int of Python or NumPy.
        name: str, name of `x` in errors.
        least: int, the minimum.
        most: int, the maximum, or `None`.

    Returns:
        int.

    Raises:
        ValueError: `x` is not an integer, or out of range.

    Example:

    >>> to_integer(np.int64(3), "max_new_tokens")
    3
    """
    try:
        value = None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        value = None
    too_large = most is not None and value is not None and value > most
    if value is None or value < least or too_large:
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(
            f"`{name}` must be an integer of {wanted}. Received: {x!r}."
        )
    return value


def to_ids(x, name: str, vocabulary_size: int) -> np.ndarray:
    """Convert token ids to int32; floats must be whole numbers.

    Args:
        x: array, tensor, int or nested list of ints.
        name: str, name of `x` in errors.
        vocabulary_size: int.

    Returns:
        int32 array of the shape of `x`.

    Raises:
        ValueError: an element is not an integer or not in the vocabulary, or
            the rows of a list differ in length.

    Example:

    >>> to_ids([2.0, 7.0], "token_ids", 320)
    array([2, 7], dtype=int32)
    """
    try:
        ids = to_numpy(x)
    except ValueError as error:  # Rows of different lengths.
        raise ValueError(
            f"`{name}` is no array. Expected: token ids, rows of one length. "
            f"Received: {error}"
        ) from error
    if not ids.size:
        return ids.astype("int32")
    if not is_numeric(ids):
        raise ValueError(
            f"`{name}` is not made of token ids. Expected: integers. "
            f"Received: {ids.ravel()[:1].tolist()[0]!r}, dtype {ids.dtype}. "
            "`tokenizer.tokenize` makes ids of text."
        )
    wide = ids.astype("float64")  # Exact for all ids, and compares bfloat16.
    # Written so that NaN is outside.
    inside = (wide >= 0) & (wide < vocabulary_size) & (wide == np.floor(wide))
    if not inside.all():
        index = tuple(map(int, np.argwhere(~inside)[0]))
        raise ValueError(
            f"`{name}` holds what is no token id. Expected: whole numbers in "
            f"0…{vocabulary_size - 1}. Received: {ids[index]} at index "
            f"{index}. Is this the tokenizer that belongs to the model?"
        )
    return wide.astype("int32")


def is_numeric(array: np.ndarray) -> bool:
    """Return whether an array has integers or floats, bfloat16 included."""
    return array.dtype.name.startswith(("int", "uint", "float", "bfloat"))
