"""Folders of data that come with the package."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def folder(name):
    """Give such a folder: a wheel has it inside, a checkout beside the package.

    Args:
        name: "presets" or "examples".

    Returns:
        `pathlib.Path`.
    """
    inside = PACKAGE / "shipped" / name
    return inside if inside.is_dir() else PACKAGE.parent / name
