"""How much each token of a response attended to each patch of the picture."""

from dataclasses import dataclass
from dataclasses import field
from typing import Any

import numpy as np
from PIL import Image

from keras_paligemma.tasks.drawing import draw_attention


@dataclass(frozen=True)
class PictureAttention:
    """The attention of a response to the patches of its picture.

    Args:
        tokens: strs, the text of each token of the response; that of the end
            token, the last one, is empty.
        shares: float32 array (tokens, rows, columns), read-only. After the
            tokens come layers and heads, if they were not averaged, and
            pictures, if the example has several. A share is attention of the
            position that predicts the token. The sum over all patches is at
            most 1: the rest is attention to text.
        picture: the example's picture, or its list of pictures; `None` if the
            model was given image embeddings.

    Example:
        >>> seen = np.array([[[1, 0]], [[0, 0.5]]], "float32")
        >>> found = PictureAttention(("a", " cat"), seen)
        >>> found.word("cat")
        array([[0. , 0.5]], dtype=float32)
    """

    tokens: tuple[str, ...]
    shares: np.ndarray = field(repr=False, compare=False)
    picture: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The response."""
        return "".join(self.tokens)

    def word(self, word: str, number: int = 0) -> np.ndarray:
        """Return the mean over the tokens of a word or a phrase.

        Args:
            word: str, a part of `text`.
            number: int, which of its occurrences, from 0.

        Returns:
            float32 array, as `shares` without the tokens.

        Raises:
            ValueError: if the text does not contain the word that often.
        """
        places = [
            place
            for place in range(len(self.text))
            if word and self.text.startswith(word, place)
        ]
        if not 0 <= number < len(places):
            raise ValueError(
                f"The response has no such word. Expected: a part of "
                f"{self.text!r}. Received: {word!r}, occurrence {number} of "
                f"{len(places)}, counted from 0."
            )
        start, end = places[number], places[number] + len(word)
        lengths = np.array([len(token) for token in self.tokens])
        ends = np.cumsum(lengths)
        inside = (ends > start) & (ends - lengths < end)
        # Bytes behind the first one of a character have no text, and the last
        # token of all, which ends the response, has none either.
        inside[:-1] |= ((lengths == 0) & (ends == end))[:-1]
        return self.shares[inside].mean(axis=0)

    def overlay(self, word: str | None = None, number: int = 0) -> Image.Image:
        """Darken the picture where there was little attention.

        Args:
            word: str, as `word` takes it; `None` uses the mean of all tokens.
            number: int, as in `word`.

        Returns:
            `PIL.Image.Image` in RGB; see `tasks.drawing.draw_attention`.

        Raises:
            ValueError: as `word` does; or if there is no picture, or more than
                one array of patches.
        """
        if word is None:
            shares = self.shares.mean(axis=0)
        else:
            shares = self.word(word, number)
        if self.picture is None or shares.ndim != 2:
            raise ValueError(
                "An overlay takes one picture and one array of its patches. "
                f"Received: shares {shares.shape}, picture "
                f"{type(self.picture).__name__}. Expected: an average over "
                "layers and heads; or call `tasks.drawing.draw_attention("
                "picture, shares)` for each picture."
            )
        return draw_attention(self.picture, shares)
