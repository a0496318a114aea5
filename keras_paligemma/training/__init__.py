"""Training runs: resumable, with callbacks, and from the command line.

Names are loaded on first use.
"""

import lazy_loader

# The stub beside this file maps each name to its module.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
