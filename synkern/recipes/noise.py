"""Noise of a known kind in clean training data (003, Appendix G.1; 000, Appendix L)."""

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
    generator = np.random.default_rng(seed)
    group = generator.permutation(np.arange(len(frame)) % len(GROUPS))
    noisy = frame.reset_index(drop=True)
    noisy["noise"] = np.array(GROUPS)[group]
    noisy = _relabel(noisy, group == GROUPS.index(SWAPPED), num_classes, generator)
    noisy = pd.concat([noisy, noisy[group == GROUPS.index(DUPLICATED)]], ignore_index=True)
    return noisy.iloc[generator.permutation(len(noisy))].reset_index(drop=True)


def flip_labels(frame: pd.DataFrame, share: float, num_classes: int, seed: int = 0) -> pd.DataFrame:
    """Give a share of the rows, chosen at random, another label than their own.

    Args:
        frame: rows with an integer column ``label`` in [0, num_classes).
        share: of rows to relabel, from 0 to 1; the number of rows is rounded.
        num_classes: number of classes, at least 2; each of the others is the new label with the same probability.
        seed: of the choice and the new labels.

    Returns:
        The rows in their order, with one more column ``true_label``, the label before.

    Raises:
        ValueError: fewer than 2 classes, or a share outside [0, 1].

    Source: 000, Appendix L (30 % uniform label noise).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"flip_labels: expected a share from 0 to 1, got {share}")
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(frame), dtype=bool)
    chosen[generator.permutation(len(frame))[: round(share * len(frame))]] = True
    return _relabel(frame.reset_index(drop=True), chosen, num_classes, generator)


def _relabel(frame: pd.DataFrame, chosen: np.ndarray, num_classes: int, generator: np.random.Generator) -> pd.DataFrame:
    """Another label for the chosen rows, each with the same probability; the old labels become the truth."""
    if num_classes < 2:
        raise ValueError(f"noise: expected at least 2 classes, got {num_classes}; no label could be changed")
    label = frame["label"].to_numpy()
    # adding 1 .. num_classes - 1 modulo num_classes reaches every other label once
    shift = generator.integers(1, num_classes, size=len(frame))
    return frame.assign(true_label=label, label=np.where(chosen, (label + shift) % num_classes, label))


def known_groups(frame: pd.DataFrame) -> pd.Series | None:
    """What is known about each row's noise: the column ``noise``, else told from ``true_label``, else None."""
    if "noise" in frame:
        return frame["noise"]
    if "true_label" in frame:
        return pd.Series(np.where(frame["label"] == frame["true_label"], ORIGINAL, SWAPPED), index=frame.index)
    return None
