"""Files and data sets as batches for `fit`.

A source is any object with a length whose `[index]` returns one example. An
example is a dictionary of `images` (a picture, or a list of frames), `prompts`
(a string) and `responses` (a string, or a list of strings of which one is
drawn each epoch). `Batches` batches a source. Names are imported lazily.
"""

import lazy_loader

# The stub beside this file lists the module of each name.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
