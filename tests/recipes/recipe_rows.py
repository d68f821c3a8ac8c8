"""Made-up rows of text that a small model can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOOD = ["fine", "great", "lovely", "superb", "bright"]
BAD = ["poor", "dull", "awful", "bleak", "weak"]
FILLER = ["the", "film", "was", "plot", "scene", "and", "actor", "music", "story", "long", "a", "of"]


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose label shows in one word of the text."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(generator.integers(2))
        words = list(generator.choice(FILLER, size=generator.integers(3, 9)))
        words.insert(int(generator.integers(len(words))), str(generator.choice(GOOD if label else BAD)))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sources(folder: Path) -> dict[str, str]:
    """Write train.jsonl, real.jsonl and test.jsonl; return their paths."""
    sizes = {"train": 60, "real": 30, "test": 40}
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", make_rows(size, seed)))
        for seed, (name, size) in enumerate(sizes.items())
    }
