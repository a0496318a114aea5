"""Tables as HTML: TEDS, an edit distance of trees, and GriTS, of grids."""

from collections.abc import Sequence

from keras_paligemma.metrics.edits import edit_distance
from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column


def tables(predictions: Sequence[str], html: Sequence[str]) -> Scores:
    """Score tables by all four metrics of the model card.

    Args:
        predictions: list of str, HTML.
        html: list of str, reference tables.

    Returns:
        `Scores` of "teds", "s_teds" (structure only), "grits_top" (spans of
        cells) and "grits_con" (their text), 0 to 1, each the mean over tables;
        rows are sorted by "teds".

    Raises:
        ValueError: a reference is no text, columns are of different lengths,
            or a library is missing.

    Example:

    >>> table = "<table><tr><td>1</td></tr></table>"
    >>> tables([table], [table]).values()["teds"]
    1.0
    """
    check_rows(predictions, html=html)
    check_texts("html", html)
    grits = needed("grits", "GriTS")
    rows = {"teds": [], "s_teds": [], "grits_top": [], "grits_con": []}
    for text, right in zip(predictions, html, strict=True):
        rows["teds"].append(teds(text, right))
        rows["s_teds"].append(teds(text, right, structure_only=True))
        found, wanted = _grids(grits, text), _grids(grits, right)
        for kind in ("top", "con"):
            score = 0.0
            if found and wanted:
                compare = getattr(grits, f"grits_{kind}")
                score = compare(wanted[kind], found[kind])[0]
            rows[f"grits_{kind}"].append(score)
    return Scores({name: column(values) for name, values in rows.items()})


def teds(prediction: str, table: str, structure_only: bool = False) -> float:
    """Return the tree-edit-distance similarity of two tables (TEDS).

    apted computes the distance on trees whose leaves are cells. It is divided
    by the number of elements below the larger table, including those inside
    cells, as in PubTabNet's own evaluator. (The package
    table-recognition-metric divides by the number of tree nodes, including the
    table itself, which gives larger values.)

    Args:
        prediction: str, HTML; a bare "<table>" is wrapped in a page.
        table: str, HTML of the reference table.
        structure_only: bool, whether to ignore the text of cells.

    Returns:
        float, 1 for equal tables; 0 if either is not a table.

    Raises:
        ValueError: apted or lxml is not installed.

    Source: https://arxiv.org/abs/1911.10683, section 5.
    """
    apted = needed("apted", "TEDS")
    found, wanted = _table(prediction), _table(table)
    if found is None or wanted is None:
        return 0.0
    nodes = max(len(found.xpath(".//*")), len(wanted.xpath(".//*")))
    trees = [_tree(table, structure_only) for table in (found, wanted)]
    distance = apted.APTED(*trees, _costs(apted)).compute_edit_distance()
    return 1.0 - float(distance) / max(nodes, 1)


def _costs(apted):
    class Costs(apted.Config):
        """The cost of renaming one node to another."""

        def rename(self, node1, node2):
            if node1["kind"] != node2["kind"]:
                return 1.0
            one, other = node1["text"], node2["text"]
            if not one and not other:
                return 0.0
            return edit_distance(one, other) / max(len(one), len(other))

        def children(self, node):
            return node["children"]

    return Costs()


def _table(text):
    """Parse the first table of a page; return `None` if it has none."""
    lxml = needed("lxml.html", "TEDS")
    empty = needed("lxml.etree", "TEDS").ParserError
    parser = lxml.HTMLParser(remove_comments=True, encoding="utf-8")
    # A model may write half of a character.
    written = text.encode("utf-8", "replace")
    try:
        page = lxml.document_fromstring(written, parser=parser)
    except empty:  # Such as a comment that does not end.
        return None
    found = page.xpath("body/table")
    return found[0] if found else None


def _tree(element, structure_only):
    """Convert an element to a tree node: tag, spans, and a cell's symbols."""
    if element.tag != "td":
        return {
            "kind": (element.tag,),
            "text": [],
            "children": [_tree(child, structure_only) for child in element],
        }
    spans = [_span(element, axis) for axis in ("col", "row")]
    text = [] if structure_only else _symbols(element)[1:-1]
    return {"kind": ("td", *spans), "text": text, "children": []}


def _span(element, axis):
    """Return the columns or rows of a cell; 1 if it names no number."""
    text = element.attrib.get(f"{axis}span", "").strip()
    return int(text) if text.isdecimal() else 1


def _symbols(element):
    """Return the tags and characters of a cell, in order."""
    symbols = [f"<{element.tag}>", *(element.text or "")]
    for child in element:
        symbols += _symbols(child)
    if element.tag != "unk":
        symbols.append(f"</{element.tag}>")
    if element.tag != "td":
        symbols += element.tail or ""
    return symbols


def _grids(grits, text):
    try:
        return grits.html_to_grids(text)
    except ValueError:  # Not HTML, such as a truncated answer.
        return None
