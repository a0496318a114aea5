"""Models as files that other programs serve.

Names are loaded on first use.
"""

import lazy_loader

# Where each name lives is said in the stub beside this file.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
