"""Tokenise prompts in a graph, exactly as the preprocessor does."""

import tensorflow as tf

from keras_paligemma.preprocessing.inputs import LEADING_TOKENS
from keras_paligemma.preprocessing.inputs import SPECIAL_TOKEN
from keras_paligemma.preprocessing.inputs import TEXT_ALONE

NOT_UTF8 = (
    "The prompt holds bytes that are not UTF-8. Expected: text in UTF-8. "
    "Received: something else. Encode it as UTF-8."
)


def read_prompts(tokenizer, prompts, start, separator, length, on_long):
    """Tokenize prompts and align them to the right.

    Args:
        tokenizer: `tensorflow_text.SentencepieceTokenizer`.
        prompts: string tensor (N,).
        start: int, id of the start token.
        separator: list of ints, ids at the end of the prompt.
        length: int, tokens of the prompt part, P.
        on_long: "error" or "truncate", as the preprocessor takes it.

    Returns:
        int32 tensor (N, P) of ids, 0 for padding; bool tensor (N, P), True on
        tokens; and string tensor (N,) of error messages, "" if there is none.
        A row with an error has the tokens of an empty prompt.

    Source: `preprocessing.inputs.plain_prompts`, without its warning, and
    `preprocessing.layout.fit_prompts` and `pack`.
    """
    valid = tf.strings.unicode_transcode(prompts, "UTF-8", "UTF-8") == prompts
    typed = tf.where(valid, prompts, "")
    texts = tf.strings.regex_replace(typed, LEADING_TOKENS, "")
    special = _special_token_error(typed, texts)
    texts = tf.strings.regex_replace(texts, r"\n\z", "", replace_global=False)
    rows = tokenizer.tokenize(texts)
    room = length - 1 - len(separator)
    needed = rows.row_lengths() + 1 + len(separator)
    errors = tf.where(valid, special, NOT_UTF8)
    if on_long == "error":
        long = needed > length
        error = tf.strings.join(
            [
                f"The prompt does not fit. Expected: at most {length} tokens, "
                "start and separator included. Received: ",
                tf.as_string(needed),
                ". Shorten it.",
            ]
        )
        errors = tf.where(long & (errors == ""), error, errors)
    count = tf.minimum(rows.row_lengths(), room)
    count = tf.cast(tf.where(errors == "", count, 0), tf.int32)
    # Shift each text to the right; start and separator are added below.
    ids = rows.to_tensor(shape=(None, room))
    first = room - count[:, None]
    column = tf.range(room)[None] - first
    ids = tf.gather(ids, tf.maximum(column, 0), batch_dims=1)
    ids = tf.where(column >= 0, ids, 0)
    ids = tf.where(column == -1, start, ids)
    begin = tf.where(first == 0, start, 0)
    ends = tf.ones_like(first) * tf.constant([separator])
    ids = tf.concat([begin, ids, ends], 1)
    padding = tf.range(length)[None] >= first
    ids = tf.ensure_shape(tf.cast(ids, tf.int32), (None, length))
    return ids, tf.ensure_shape(padding, (None, length)), errors


def _special_token_error(typed, texts):
    """Return an error that locates a special token in a prompt, or "".

    Args:
        typed: string tensor (N,), prompts as received.
        texts: string tensor (N,), the same without leading special tokens,
            which the layout adds.

    Returns:
        string tensor (N,).
    """
    pattern = f"(?s)^.*?(({SPECIAL_TOKEN}).*)$"
    rest = tf.strings.regex_replace(texts, pattern, r"\1")
    place = tf.strings.length(typed, "UTF8_CHAR")
    place -= tf.strings.length(rest, "UTF8_CHAR")
    error = tf.strings.join(
        [
            f"The prompt holds a special token. {TEXT_ALONE}Received: ",
            tf.strings.regex_replace(texts, pattern, r"\2"),
            " at character ",
            tf.as_string(place),
            ". Remove it.",
        ]
    )
    return tf.where(tf.strings.regex_full_match(texts, pattern), error, "")
