"""How far two texts are apart, letter by letter: for answers that may be worded a little differently."""

from __future__ import annotations

from collections import Counter

MAX_ORDER = 6
_BETA_SQUARED = 4.0
"""Recall counts twice as much as precision: chrF2."""


def edit_distance(a: str, b: str, most: int) -> int:
    """Levenshtein's distance of two texts in characters; ``most + 1`` where it is more than that."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return min(row[-1], most + 1)


def chrf(found: str, expected: str) -> float:
    """Character n-gram F-score of a text against what is expected, 0 to 1, without regard to spaces [1].

    It compares letters, not meaning: a synonym scores nothing, another ending of the same word almost all.

    [1] M. Popović: chrF: character n-gram F-score for automatic MT evaluation, WMT 2015
    """
    found, expected = "".join(found.split()), "".join(expected.split())
    if not found or not expected:
        return float(found == expected)
    precisions, recalls = [], []
    for order in range(1, min(MAX_ORDER, len(found), len(expected)) + 1):
        a, b = _grams(found, order), _grams(expected, order)
        shared = (a & b).total()
        precisions.append(shared / a.total())
        recalls.append(shared / b.total())
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (_BETA_SQUARED * precision + recall)


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
