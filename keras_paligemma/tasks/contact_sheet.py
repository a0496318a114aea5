"""Pictures side by side, with captions."""

from collections.abc import Sequence

from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

# Pictures per row, and in pixels: their longest side, text height, margin.
COLUMNS, CELL, FONT_SIZE, MARGIN = 3, 448, 22, 8


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str]
) -> Image.Image:
    """Arrange pictures in rows, each above its caption.

    Args:
        pictures: of any size; those larger than a cell are reduced.
        captions: one per picture, drawn on one line; one that is too wide
            ends with "…".

    Returns:
        `PIL.Image.Image` in RGB.

    Raises:
        ValueError: there are no pictures, or another number of captions.

    Example:

    >>> contact_sheet([Image.new("RGB", (100, 50))] * 4, [""] * 4).size
    (1376, 1008)
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(
            "A sheet has one caption a picture. Expected: one picture or more. "
            f"Received: {len(pictures)} pictures, {len(captions)} captions."
        )
    width, height = CELL + MARGIN, CELL + MARGIN + 2 * FONT_SIZE
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    size = (columns * width + MARGIN, rows * height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    pairs = zip(pictures, captions, strict=True)
    for number, (picture, caption) in enumerate(pairs):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * width, MARGIN + row * height
        small = picture.copy()
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (x, y))
        pen.text((x, y + CELL + 4), _cut(caption, font), "black", font)
    return sheet


def _cut(caption, font):
    """Put a caption on one line, shortened to the width of a cell."""
    caption = " ".join(caption.split())
    if font.getlength(caption) <= CELL:
        return caption
    while font.getlength(f"{caption}…") > CELL:
        caption = caption[:-1]
    return f"{caption}…"
