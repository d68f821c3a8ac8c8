"""Noise of a known kind in clean training data (003, Appendix G.1)."""

from __future__ import annotations

import numpy as np
import pandas as pd

ORIGINAL, SWAPPED, DUPLICATED = GROUPS = ("original", "swapped", "duplicated")


def add_noise(frame: pd.DataFrame, num_classes: int, seed: int = 0) -> pd.DataFrame:
    """Make noisy training data out of clean data: a third of the rows stays, a third is relabelled, a third doubled.

    The rows are split at random into three parts whose sizes differ by one at most. "original" rows stay as they are;
    "swapped" rows get another label than their own, each of the others with the same probability; "duplicated" rows
    stand twice in the result.

    Args:
        frame: rows with an integer column ``label`` in [0, num_classes).
        num_classes: number of classes, at least 2.
        seed: of the split, the new labels and the order of the result.

    Returns:
        A shuffled frame with a third more rows and two more columns: ``noise``, one of "original", "swapped" and
        "duplicated", and ``true_label``, the label before.

    Raises:
        ValueError: fewer than 2 classes, so that no label can change.

    Source: 003, Appendix G.1.
    """
    if num_classes < 2:
        raise ValueError(f"add_noise: expected at least 2 classes, got {num_classes}; no label could be changed")
    generator = np.random.default_rng(seed)
    group = generator.permutation(np.arange(len(frame)) % len(GROUPS))
    noisy = frame.reset_index(drop=True)
    noisy["noise"] = np.array(GROUPS)[group]
    noisy["true_label"] = noisy["label"]
    # adding 1 .. num_classes - 1 modulo num_classes reaches every other label once
    shift = generator.integers(1, num_classes, size=len(noisy))
    swapped = group == GROUPS.index(SWAPPED)
    noisy["label"] = np.where(swapped, (noisy["label"].to_numpy() + shift) % num_classes, noisy["label"].to_numpy())
    noisy = pd.concat([noisy, noisy[group == GROUPS.index(DUPLICATED)]], ignore_index=True)
    return noisy.iloc[generator.permutation(len(noisy))].reset_index(drop=True)


def known_groups(frame: pd.DataFrame) -> pd.Series | None:
    """What is known about each row's noise: the column ``noise``, else told from ``true_label``, else None."""
    if "noise" in frame:
        return frame["noise"]
    if "true_label" in frame:
        return pd.Series(np.where(frame["label"] == frame["true_label"], ORIGINAL, SWAPPED), index=frame.index)
    return None
