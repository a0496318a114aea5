"""The metrics of the model card, as its evaluators compute them.

A metric takes predictions and columns of reference answers, one per row, and
returns `Scores`. Names are loaded on first use.
"""

import lazy_loader

# The stub beside this file maps each name to its module.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
