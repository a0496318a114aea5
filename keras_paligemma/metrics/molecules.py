"""Molecules in pictures: equality of SMILES strings."""

from collections.abc import Sequence

from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column


def smiles(predictions: Sequence[str], molecules: Sequence[str]) -> Scores:
    """Score SMILES strings by whether they are the same molecule.

    Args:
        predictions: list of str; invalid SMILES strings count as wrong.
        molecules: list of str, the reference SMILES strings.

    Returns:
        `Scores` of "full_match", whether RDKit's canonical strings are equal,
        including chirality; "exact", whether the strings themselves are; and
        "valid", whether RDKit can parse the prediction.

    Raises:
        ValueError: a reference cannot be parsed, columns are of different
            lengths, or RDKit is not installed.

    Example:

    >>> smiles(["OCC"], ["CCO"]).values()["full_match"]
    1.0

    Source: https://www.rdkit.org/docs/GettingStartedInPython.html.
    """
    check_rows(predictions, molecules=molecules)
    check_texts("molecules", molecules)
    wanted = [canonical(text) for text in molecules]
    if None in wanted:
        row = wanted.index(None)
        raise ValueError(
            f"The right molecule of row {row} is no SMILES string. Received: "
            f"{molecules[row]!r:.80}."
        )
    found = [canonical(text) for text in predictions]
    pairs = list(zip(predictions, molecules, strict=True))
    same = zip(found, wanted, strict=True)
    return Scores(
        {
            "full_match": column([first == second for first, second in same]),
            "exact": column([first == second for first, second in pairs]),
            "valid": column([molecule is not None for molecule in found]),
        }
    )


def canonical(text: str) -> str | None:
    """Return RDKit's canonical SMILES string, or `None` if invalid."""
    chem = needed("rdkit.Chem", "A molecule's canonical form")
    logs = needed("rdkit.rdBase", "A molecule's canonical form")
    # RDKit takes what follows a space for the molecule's name, and cannot take
    # half of a character, which a model may write.
    if len(text.split()) != 1 or not text.isascii():
        return None
    with logs.BlockLogs():
        molecule = chem.MolFromSmiles(text.strip())
    return None if molecule is None else chem.MolToSmiles(molecule)
