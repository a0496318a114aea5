"""Names for types that many signatures share."""

import os
from typing import Any
from typing import TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]

# A tensor of any backend, or what Keras makes one of. The backends have no
# common type, and naming theirs would import them; the letters at the end of a
# name (`x_BTD`) say rank and axes.
Tensor: TypeAlias = Any

# What `get_config` gives and a class's `from_config` takes.
Config: TypeAlias = dict[str, Any]
