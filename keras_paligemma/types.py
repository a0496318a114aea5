"""Type aliases that many signatures share."""

import os
from typing import Any
from typing import TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]

# A tensor of any backend, or a value that Keras converts to a tensor. The
# backends have no common type, and naming their types would import them. The
# letters at the end of a name (`x_BTD`) are the axes.
Tensor: TypeAlias = Any

# The result of `get_config` and the argument of `from_config`.
Config: TypeAlias = dict[str, Any]
