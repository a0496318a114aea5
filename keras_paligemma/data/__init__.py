"""Files and data sets to the batches that `fit` takes.

A source is any object of a length whose `[index]` gives one example, a
dictionary of `images` (a picture, or a list of frames), `prompts` (a string)
and `responses` (a string, or a list of strings of which one is drawn each
epoch). `Batches` makes batches of a source. Names are loaded on first use.
"""

import lazy_loader

# Where each name lives is said in the stub beside this file.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
