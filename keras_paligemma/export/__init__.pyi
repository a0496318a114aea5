from .targets import export as export
