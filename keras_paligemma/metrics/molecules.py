"""Molecules drawn in pictures: is it the same one?"""

from collections.abc import Sequence

from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column


def smiles(predictions: Sequence[str], molecules: Sequence[str]) -> Scores:
    """Score SMILES strings: the same molecule, whatever its spelling.

    Args:
        predictions: SMILES strings; what is none is wrong.
        molecules: the right ones.

    Returns:
        `Scores` of "full_match", 1 where RDKit's canonical strings agree,
        chirality included; "exact", where the strings do; and "valid", where
        RDKit can read the prediction.

    Raises:
        ValueError: a right molecule cannot be read.

    Example:

    >>> smiles(["OCC"], ["CCO"]).values()["full_match"]
    1.0

    Source: https://www.rdkit.org/docs/GettingStartedInPython.html.
    """
    check_rows(predictions, molecules=molecules)
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
            "full_match": column([one == other for one, other in same]),
            "exact": column([one == other for one, other in pairs]),
            "valid": column([molecule is not None for molecule in found]),
        }
    )


def canonical(text: str) -> str | None:
    """Write a molecule in RDKit's one way; `None` for what is none."""
    chem = needed("rdkit.Chem", "A molecule's canonical form")
    logs = needed("rdkit.rdBase", "A molecule's canonical form")
    if not text.strip():
        return None
    with logs.BlockLogs():
        molecule = chem.MolFromSmiles(text.strip())
    return None if molecule is None else chem.MolToSmiles(molecule)
