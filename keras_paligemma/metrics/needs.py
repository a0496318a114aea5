"""Libraries that a metric computes with, and how to get them."""

import importlib


def needed(module: str, what: str, extra: str = "metrics"):
    """Import a library, or say what it is for and how it is installed.

    Args:
        module: str, such as "pycocotools.mask".
        what: str that begins the message, such as "TEDS".
        extra: str, the package's extra that brings it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what} is computed by {module.partition('.')[0]}, which is not "
            f"installed. Run `pip install 'keras_paligemma[{extra}]'`."
        ) from error
