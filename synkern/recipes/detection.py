"""How well weights find wrong labels, where it is known which labels are wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd


def wrong_labels(frame: pd.DataFrame) -> np.ndarray | None:
    """(N,) bool: whether each row's label is not its ``true_label``; None where the truth is not known."""
    if "true_label" not in frame:
        return None
    return (frame["label"] != frame["true_label"]).to_numpy()


def area_under_roc(weight: np.ndarray, wrong: np.ndarray) -> float | None:
    """Probability that a wrong row weighs less than a right one, ties counted half.

    Args:
        weight: (N,) weights, low where a label is suspected.
        wrong: (N,) bool.

    Returns:
        The area under the curve; None unless there are both wrong and right rows.
    """
    bad = int(wrong.sum())
    good = len(wrong) - bad
    if not bad or not good:
        return None
    rank = pd.Series(weight).rank().to_numpy()
    return float((rank[~wrong].sum() - good * (good + 1) / 2) / (bad * good))


def precision_at_wrong(weight: np.ndarray, wrong: np.ndarray) -> float | None:
    """Share of wrong labels among the k rows of lowest weight, k the number of wrong labels; None if there are none.

    Of rows that tie at the k-th place each counts with the same probability.
    """
    count = int(wrong.sum())
    if not count:
        return None
    limit = np.sort(weight)[count - 1]
    below, tied = weight < limit, weight == limit
    return float((wrong[below].sum() + (count - below.sum()) * wrong[tied].mean()) / count)


def detection(weight: np.ndarray, wrong: np.ndarray) -> dict[str, float | int | None]:
    """All of the above, with the counts they rest on; the precision of a blind choice is ``wrong / rows``."""
    return {
        "rows": len(wrong),
        "wrong": int(wrong.sum()),
        "auroc": area_under_roc(weight, wrong),
        "precision_at_wrong": precision_at_wrong(weight, wrong),
        "mean_weight_wrong": float(weight[wrong].mean()) if wrong.any() else None,
        "mean_weight_right": float(weight[~wrong].mean()) if not wrong.all() else None,
    }
