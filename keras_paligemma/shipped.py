"""Folders of data that come with the package."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def folder(name):
    """Return a data folder: inside the installed package, else beside it.

    Args:
        name: "presets" or "examples".

    Returns:
        `pathlib.Path`.
    """
    inside = PACKAGE / "shipped" / name
    return inside if inside.is_dir() else PACKAGE.parent / name
