"""Tokenization of users' prompts and responses."""

from keras_paligemma.preprocessing.inputs import check_no_special_tokens
from keras_paligemma.preprocessing.inputs import plain_prompts
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.preprocessing.layout import fit_prompts


def tokenize_texts(
    x: dict, tokenizer, prompt_length: int, on_long_prompt: str
) -> tuple[list[list[int]], list[list[int]], bool]:
    """Tokenize the prompts of examples, and their responses if there are any.

    Args:
        x: dict with `"prompts"` and optionally `"responses"`: one string
            each, or lists of them.
        tokenizer: `PaliGemmaTokenizer`.
        prompt_length: int, maximum number of tokens of a prompt, bos and
            separator included.
        on_long_prompt: str, as in `fit_prompts`.

    Returns:
        Rows of prompts, with bos and separator; rows of responses, without
        eos; and a bool, whether `x` is a batch.

    Raises:
        ValueError: prompts are missing or too long, responses do not match
            them, or the tokenizer has no token for the separator.
    """
    if x.get("prompts") is None:
        raise ValueError(
            "The prompts are missing. Expected: a dictionary with "
            f"'images' and 'prompts'. Received: {sorted(x)}."
        )
    strings, batched = to_strings(x["prompts"], "prompts")
    separator, *rows = plain_rows(tokenizer, ["\n", *plain_prompts(strings)])
    if not separator:
        raise ValueError(
            "The tokenizer drops newlines, which separate prompt and "
            "response. Expected: a SentencePiece model whose normalizer "
            "keeps them, such as 'identity'. Received: no token."
        )
    prompts = fit_prompts(
        rows,
        [tokenizer.start_token_id],
        separator,
        prompt_length,
        on_long_prompt,
    )
    if x.get("responses") is None:
        return prompts, [[] for _ in prompts], batched
    strings, responses_batched = to_strings(x["responses"], "responses")
    if (len(strings), responses_batched) != (len(prompts), batched):
        raise ValueError(
            "Prompts and responses do not match. Expected: one response a "
            "prompt, both strings or both lists. Received: "
            f"{len(prompts)} prompts, {len(strings)} responses."
        )
    check_no_special_tokens(strings, "responses")
    return prompts, plain_rows(tokenizer, strings), batched


def plain_rows(tokenizer, strings: list[str]) -> list[list[int]]:
    """Return the tokens of texts without what a tokenizer may add.

    Args:
        tokenizer: `PaliGemmaTokenizer`; `add_bos` and `add_eos` change nothing.
        strings: list of str.

    Returns:
        list of lists of ids, without bos and eos.
    """
    rows = tokenizer.tokenize(strings)
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    rows = [row[1:] if row[:1] == [start] else row for row in rows]
    return [row[:-1] if row[-1:] == [end] else row for row in rows]
