"""Reading data: every format, every kind of row that cannot be used, labels and noise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recipe_rows import make_rows, write_jsonl

from synkern.recipes.data import Columns, LabelSet, canonical_label, read_labelled
from synkern.recipes.errors import DataError
from synkern.recipes.noise import GROUPS, add_noise, flip_labels, known_groups

ROWS = make_rows(12, seed=0)


def _write(kind: str, folder: Path) -> str:
    frame = pd.DataFrame(ROWS)
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        folder = folder / "hub"
        folder.mkdir()
        frame.to_parquet(folder / "validation.parquet")
        return f"{folder}:validation"
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "datasets"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    data = read_labelled(_write(kind, tmp_path))
    assert data.frame["text"].tolist() == [row["text"] for row in ROWS]
    assert data.frame["label"].tolist() == [row["label"] for row in ROWS]
    assert data.labels.names == ("0", "1")
    first = {"jsonl": 1, "jsonl.gz": 1, "csv": 2, "parquet": 1, "datasets": 1}[kind]
    assert data.frame["row"].tolist() == list(range(first, first + len(ROWS)))


def test_class_names_of_a_dataset_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "train.parquet")
    data = read_labelled(str(tmp_path), default_split="train")
    assert data.labels.names == ("bad", "good")
    assert data.frame["label"].tolist() == [row["label"] for row in ROWS]


BAD_JSONL = {
    "malformed": ('{"text": "a", "label": 1', "malformed JSON"),
    "no object": ('["a", 1]', "expected a JSON object, got list"),
    "missing text": ('{"label": 1}', "column 'text', got none"),
    "empty text": ('{"text": "  ", "label": 1}', "got an empty one"),
    "number as text": ('{"text": 5, "label": 1}', "got int 5"),
    "missing label": ('{"text": "a"}', "expected a label in column 'label', got none"),
    "null label": ('{"text": "a", "label": null}', "expected a label in column 'label', got none"),
    "empty label": ('{"text": "a", "label": ""}', "expected a label in column 'label', got none"),
    "fractional label": ('{"text": "a", "label": 0.5}', "got 0.5"),
    "list as label": ('{"text": "a", "label": [1]}', r"got \[1\]"),
    "unknown label": ('{"text": "a", "label": 7}', "expected one of the labels 0, 1, got label '7'"),
    "unknown truth": ('{"text": "a", "label": 1, "true_label": 9}', "got true_label '9'"),
    "lone surrogate": ('{"text": "a\\ud800", "label": 1}', "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_JSONL)
def test_a_bad_row_is_refused_with_its_line_or_skipped(name: str, tmp_path: Path) -> None:
    line, message = BAD_JSONL[name]
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*good[:3], line, "", *good[3:]]) + "\n", encoding="utf-8")
    labels = LabelSet(("0", "1"))
    with pytest.raises(DataError, match=message) as caught:
        read_labelled(str(path), labels=labels)
    assert f"{path}, line 4: " in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)
    data = read_labelled(str(path), labels=labels, skip_bad_rows=True)
    assert len(data) == len(ROWS)
    assert len(data.skipped) == 1 and ", line 4: " in data.skipped[0]
    assert data.frame["row"].tolist() == [1, 2, 3, *range(6, 6 + len(ROWS) - 3)]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a", "label": 1}\n{"text": "caf\xe9", "label": 0}\n')
    with pytest.raises(DataError, match=r"line 2: .*not UTF-8"):
        read_labelled(str(path))


def test_csv_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",a\nb\nlast,b\n', encoding="utf-8-sig")
    with pytest.raises(DataError, match="line 4: expected 2 fields as in the header, got 1"):
        read_labelled(str(path))
    data = read_labelled(str(path), skip_bad_rows=True)
    assert data.frame["text"].tolist() == ["two\nlines", "last"]
    assert data.frame["row"].tolist() == [2, 5]
    long = "word " * 40_000
    path.write_text(f"text,label\n{long},a\n", encoding="utf-8")
    assert read_labelled(str(path)).frame["text"][0] == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "expected a file, got none"),
        ("empty.jsonl", b"", "no usable row"),
        ("broken.jsonl.gz", b"not gzip", "expected a readable .jsonl.gz file"),
        ("broken.parquet", b"not parquet", "expected a .parquet file"),
        ("columns.csv", b"body,label\na,1\n", "--text-column"),
        ("columns.csv", b"text,class\na,1\n", "--label-column"),
    ],
)
def test_a_source_that_cannot_be_used(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_labelled(str(path), skip_bad_rows=True)
    assert str(path) in str(caught.value)


def test_a_dataset_id_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a \.jsonl, .*or a dataset id"):
        read_labelled(str(tmp_path / "nothing"))


def test_text_pairs_by_default_and_by_name(tmp_path: Path) -> None:
    rows = [{"text_a": "a", "text_b": "b", "label": "x"}, {"text_a": "c", "text_b": "d", "label": "y"}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = read_labelled(str(path))
    assert data.paired
    assert data.frame[["text", "text_pair"]].to_numpy().tolist() == [["a", "b"], ["c", "d"]]
    turned = read_labelled(str(path), Columns(text="text_b", text_pair="text_a"))
    assert turned.frame["text"].tolist() == ["b", "d"]
    single = read_labelled(str(path), Columns(text="text_b"))
    assert not single.paired


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, "1"), (True, "1"), (2.0, "2"), (" pos ", "pos"), (np.int8(3), "3"), (None, None), (float("nan"), None)],
)
def test_labels_are_compared_as_text(value: Any, expected: str | None) -> None:
    assert canonical_label(value) == expected


def test_label_sets(tmp_path: Path) -> None:
    assert LabelSet.from_labels(["10", "9", "-1"]).names == ("-1", "9", "10")
    assert LabelSet.from_labels(["b", "a", "10"]).names == ("10", "a", "b")
    named = LabelSet.from_option("negative, positive")
    assert [named.index(label) for label in ("positive", "0", "2", "other")] == [1, 0, None, None]
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"labels": ["x", "y"]}))
    assert LabelSet.from_option(str(path)).names == ("x", "y")
    # where names are numbers, a label is a name and never an index
    assert LabelSet(("5", "6")).index("0") is None
    with pytest.raises(DataError, match="at least two different names"):
        LabelSet.from_option("only")


@pytest.mark.parametrize("classes", [2, 5])
def test_noise_keeps_a_third_relabels_a_third_and_doubles_a_third(classes: int) -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"row": range(3001), "text": "t", "label": generator.integers(classes, size=3001)})
    noisy = add_noise(frame, classes, seed=1)
    counts = noisy["noise"].value_counts()
    assert counts["original"] + counts["swapped"] + counts["duplicated"] / 2 == 3001
    assert all(abs(counts[name] / (2 if name == "duplicated" else 1) - 1000) <= 1 for name in GROUPS)
    swapped = noisy["noise"] == "swapped"
    assert (noisy.loc[swapped, "label"] != noisy.loc[swapped, "true_label"]).all()
    assert (noisy.loc[~swapped, "label"] == noisy.loc[~swapped, "true_label"]).all()
    # every other label is equally likely: within five standard deviations
    shift = (noisy.loc[swapped, "label"] - noisy.loc[swapped, "true_label"]) % classes
    share = 1 / (classes - 1)
    tolerance = 5 * np.sqrt(1000 * share * (1 - share))
    assert all(abs((shift == step).sum() - 1000 * share) <= tolerance + 1 for step in range(1, classes))
    assert (noisy[noisy["noise"] == "duplicated"].groupby("row").size() == 2).all()
    assert (noisy[noisy["noise"] != "duplicated"].groupby("row").size() == 1).all()
    truth = noisy.groupby("row")["true_label"].first().to_numpy()
    assert (truth == frame["label"].to_numpy()).all()
    pd.testing.assert_frame_equal(noisy, add_noise(frame, classes, seed=1))
    assert not noisy["row"].equals(add_noise(frame, classes, seed=2)["row"])


def test_noise_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        add_noise(pd.DataFrame({"text": ["a"], "label": [0]}), 1)


def test_groups_are_told_from_true_labels() -> None:
    frame = pd.DataFrame({"label": [0, 1], "true_label": [0, 0]})
    groups = known_groups(frame)
    assert groups is not None and groups.tolist() == ["original", "swapped"]
    assert known_groups(frame[["label"]]) is None


def test_truth_columns_are_read_back(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x", "true_label": "y", "noise": "swapped"},
            {"text": "b", "label": "y", "true_label": "y", "noise": "original"}]  # fmt: skip
    data = read_labelled(str(write_jsonl(tmp_path / "noisy.jsonl", rows)))
    assert data.frame["noise"].tolist() == ["swapped", "original"]
    assert data.frame["true_label"].tolist() == [1, 1]


def test_sample_is_seeded_and_keeps_the_order(tmp_path: Path) -> None:
    data = read_labelled(str(write_jsonl(tmp_path / "rows.jsonl", ROWS)))
    part = data.sample(5, seed=3)
    assert len(part) == 5 and part.frame["row"].is_monotonic_increasing
    assert part.fingerprint() == data.sample(5, seed=3).fingerprint() != data.sample(5, seed=4).fingerprint()
    assert data.sample(100) is data


@pytest.mark.parametrize("classes", [2, 4])
def test_flipped_labels(classes: int) -> None:
    frame = pd.DataFrame({"text": [str(i) for i in range(400)], "label": np.arange(400) % classes})
    flipped = flip_labels(frame, 0.3, classes, seed=1)
    pd.testing.assert_frame_equal(flipped, flip_labels(frame, 0.3, classes, seed=1))
    assert flipped["text"].tolist() == frame["text"].tolist()
    assert flipped["true_label"].tolist() == frame["label"].tolist()
    wrong = flipped["label"] != flipped["true_label"]
    assert wrong.sum() == 120
    shift = (flipped["label"] - flipped["true_label"])[wrong] % classes
    assert sorted(shift.unique()) == list(range(1, classes))
    assert not wrong.equals(flip_labels(frame, 0.3, classes, seed=2).eval("label != true_label"))
    assert flip_labels(frame, 0.0, classes)["label"].equals(frame["label"])
    with pytest.raises(ValueError, match="at least 2 classes"):
        flip_labels(frame, 0.3, 1)
    with pytest.raises(ValueError, match=r"a share from 0 to 1, got 1\.5"):
        flip_labels(frame, 1.5, classes)
