"""Import of the optional libraries that metrics use."""

import importlib


def needed(module: str, what: str, extra: str = "metrics"):
    """Import an optional library.

    Args:
        module: str, such as "pycocotools.mask".
        what: str, what the library computes, such as "TEDS"; it begins the
            error message.
        extra: str, the package's extra that installs the library.

    Returns:
        The module.

    Raises:
        ValueError: it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what} is computed by {module.partition('.')[0]}, which is not "
            f"installed. Run `pip install 'keras_paligemma[{extra}]'`."
        ) from error
