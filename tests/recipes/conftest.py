"""Tiny data sets, and settings under which a whole training takes a second or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_rows import make_rows, write_sources

pytest.importorskip("typer", reason="the recipes need the packages of the extra `recipes`")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drawing takes longer than a tiny training; the tests that look at plots are ask for ``draws_plots``."""
    with pytest.MonkeyPatch.context() as patch:
        if "draws_plots" not in request.fixturenames:
            patch.setattr("synkern.recipes.plots.write_plots", lambda report, groups: None)
            patch.setattr("synkern.recipes.reweight_plots.write_plots", lambda report: None)
        yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a transformers model with dropout and random parameters."""
    from transformers import BertConfig, BertForSequenceClassification

    from synkern.recipes.models import word_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = word_tokenizer([row["text"] for row in make_rows(200, seed=9)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def draws_plots() -> None:
    """Asked for by a test that needs the plots."""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    return write_sources(tmp_path)


@pytest.fixture
def make_settings(sources: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    from synkern.recipes.settings import TrainSettings

    def make(**options: Any) -> TrainSettings:
        defaults = {
            "out": str(tmp_path / "out"),
            "methods": ("ce", "focal", "imp", "dimp"),
            "seeds": 1,
            "epochs": 2,
            "checker_epochs": 2,
            "batch_size": 16,
            "threads": 1,
            "device": "cpu",
            "noise": True,
        }
        return TrainSettings(**{**sources, **defaults, **options})

    return make
