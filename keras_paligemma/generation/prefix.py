"""The value that `model.prefill` returns: a prefix to continue many times."""

from dataclasses import dataclass
from dataclasses import field
from typing import Any

from keras_paligemma.types import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of pictures and prompts, read-only.

    `generate`, `stream`, `score` and `embed` take it as the input `prefix`,
    and copy the rows that they continue. It does not follow the weights: after
    training, or for another adapter, compute it again.

    Args:
        cache: nest of the keys and values of all layers; `layer` reads it.
        padding_mask: bool tensor (B, P), True on image tokens and on tokens
            of the prompt.
        positions: int32 tensor (B, P), their rotary positions.
        last_hidden_states: tensor (B, D), after the final norm; the head
            predicts the first token of the response from it.
        prompts: strs, a prompt for each row.
        single: bool, whether it was made from one example, not from a list.

    Example:

    ```python
    prefix = model.prefill({"images": picture, "prompts": "caption en"})
    keys, values = prefix.layer(0)  # (1, tokens, key-value heads, head_dim)
    ```
    """

    cache: Any = field(repr=False)
    padding_mask: Tensor = field(repr=False)
    positions: Tensor = field(repr=False)
    last_hidden_states: Tensor = field(repr=False)
    prompts: tuple[str, ...]
    single: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_layers(self) -> int:
        """Number of layers of the text decoder."""
        if isinstance(self.cache, list):
            return len(self.cache)
        return self.cache[0].shape[1]

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer.

        Args:
            number: int, from 0.

        Returns:
            Two tensors (B, P, key-value heads, head_dim) in the compute
            dtype. The keys are rotated by `positions`.
        """
        if isinstance(self.cache, list):
            keys, values = self.cache[number]
            return keys, values
        keys, values = self.cache
        return keys[:, number], values[:, number]

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that `generation.prefill` takes."""
        return {
            "layers": self.cache,
            "valid": self.padding_mask,
            "positions": self.positions,
            "last": self.last_hidden_states,
        }
