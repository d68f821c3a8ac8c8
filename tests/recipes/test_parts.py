"""The parts of the recipes on their own: batches, model, metrics, losses, states, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synkern.recipes.checkpoint import load_state, save_state
from synkern.recipes.files import write_folder, write_text
from synkern.recipes.importance import METHODS, LossOptions
from synkern.recipes.models import BiLSTMClassifier, BiLSTMConfig
from synkern.recipes.training import batches, classification_metrics


def test_batches_hold_every_row_once_and_follow_from_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=1000)
    one = batches(lengths, 16, seed=1, epoch=2)
    assert sorted(np.concatenate(one).tolist()) == list(range(1000))
    again = batches(lengths, 16, seed=1, epoch=2)
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    for other in (batches(lengths, 16, seed=1, epoch=3), batches(lengths, 16, seed=2, epoch=2)):
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(one, other, strict=True))
    widths = [np.ptp(lengths[rows]) for rows in one]
    assert np.mean(widths) < 15, "rows of a batch are about equally long"


def test_padding_does_not_change_what_the_bilstm_says() -> None:
    torch.manual_seed(0)
    model = BiLSTMClassifier(BiLSTMConfig(vocabulary_size=30, num_classes=3, embedding_size=8, hidden_size=5))
    ids = torch.randint(3, 30, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    together = model(ids, mask)
    alone = torch.cat([model(ids[:1], mask[:1]), model(ids[1:, :4], mask[1:, :4])])
    torch.testing.assert_close(together, alone)


def test_the_bilstm_reads_both_ways_like_torch() -> None:
    torch.manual_seed(0)
    model = BiLSTMClassifier(BiLSTMConfig(vocabulary_size=30, num_classes=3, embedding_size=8, hidden_size=5))
    assert all(parameter.abs().max() <= 10**-0.5 for parameter in model.parameters())
    both = torch.nn.LSTM(8, 5, batch_first=True, bidirectional=True)
    state = {name: value for name, value in model.forward_lstm.state_dict().items()}
    state |= {f"{name}_reverse": value for name, value in model.backward_lstm.state_dict().items()}
    both.load_state_dict(state)
    ids = torch.randint(3, 30, (2, 7))
    expected = model.output(both(model.embedding(ids))[0].mean(1))
    torch.testing.assert_close(model(ids, torch.ones_like(ids)), expected)


def test_metrics_by_hand() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    logits = torch.nn.functional.one_hot(predicted, 4).float() * 3
    metrics = classification_metrics(logits, target)
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    # F1 of classes 0, 1, 2; class 3 occurs nowhere
    assert metrics["macro_f1"] == pytest.approx((2 * 2 / (3 + 4) + 2 * 1 / (2 + 2) + 0) / 3)
    assert metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)))


class _Checkers:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def quality(self) -> torch.Tensor:
        self.asked.append("quality")
        return torch.tensor([0.9, 0.2, 0.5]).log()

    def diversity(self) -> torch.Tensor:
        self.asked.append("diversity")
        return torch.tensor([0.5, 0.8, 0.1]).log()


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_the_paper(method: str) -> None:
    torch.manual_seed(0)
    checkers = _Checkers()
    row_loss = METHODS[method](checkers, LossOptions(gamma=2.0))
    assert checkers.asked == {"imp": ["quality", "diversity"], "dimp": ["quality"]}.get(method, [])
    logits = torch.randn(2, 4, requires_grad=True)
    target, rows = torch.tensor([3, 0]), torch.tensor([2, 0])
    loss, weight = row_loss(logits, target, rows)
    (gradient,) = torch.autograd.grad(loss, logits)
    t = logits.log_softmax(1)[[0, 1], target]
    quality, diversity = torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.5])
    expected = {
        "ce": torch.ones(2),
        "focal": (1 - t.exp()) ** 2,
        "imp": quality / diversity,
        "dimp": quality / t.exp().detach(),
    }[method]
    torch.testing.assert_close(weight, expected.detach())
    reference = -(expected * t).mean()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, logits)[0])


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "numbers": {"whole": 3, "half": 0.1 + 0.2, "text": "ß", "none": None, "yes": True},
        "by_index": {0: {"step": torch.tensor(2.0)}, 1: {"step": torch.tensor(3, dtype=torch.int64)}},
        "list": [torch.arange(3), [1.5]],
        "array": np.arange(4.0).reshape(2, 2),
        "rng": torch.get_rng_state(),
        "empty": {},
    }
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    back = load_state(path)
    assert back["numbers"] == state["numbers"] and back["empty"] == {}
    assert list(back["by_index"]) == [0, 1]
    assert back["by_index"][1]["step"].dtype == torch.int64
    assert torch.equal(back["list"][0], torch.arange(3)) and back["list"][1] == [1.5]
    assert torch.equal(back["array"], torch.arange(4.0, dtype=torch.float64).reshape(2, 2))
    assert torch.equal(back["rng"], torch.get_rng_state())
    with pytest.raises(TypeError, match="a state holds tensors"):
        save_state(path, {"function": print})
    assert load_state(path)["numbers"] == state["numbers"], "a failed write leaves the old file"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"

    def fail(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise OSError("disk full")

    write_folder(tmp_path / "folder", lambda folder: (folder / "whole").write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "folder", fail)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.txt", "folder", "whole"]
