"""Text classifiers: the BiLSTM that SunGen trains from scratch, and any transformers model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from synkern.recipes.data import LabelledText, LabelSet
from synkern.recipes.errors import RecipeError
from synkern.recipes.files import write_folder, write_json
from synkern.recipes.settings import BILSTM

_PAD, _UNKNOWN, _SEPARATOR = "[PAD]", "[UNK]", "[SEP]"
_DESCRIPTION = "classifier.json"


@dataclass(frozen=True)
class BiLSTMConfig:
    """Sizes of the task model of 000 (SunGen)."""

    vocabulary_size: int
    num_classes: int
    embedding_size: int = 100
    hidden_size: int = 150


class BiLSTMClassifier(nn.Module):
    """One bidirectional LSTM layer over word embeddings, mean of its states, one linear layer.

    All parameters start uniform in +-1/sqrt(2 hidden_size); no dropout. Each direction is an LSTM of its own: the
    backward one reads every row reversed within its length, so padding never changes a result, and no packed sequence
    is needed (on CPUs packing costs three times the time).

    Source: 000 (SunGen), section 4.1 and its released settings; the mean over words is this library's choice.
    """

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.forward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.backward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(2 * config.hidden_size, config.num_classes)
        bound = (2 * config.hidden_size) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (N, C) of token indices (N, T) whose mask (N, T) is 1 on tokens and 0 on the padding behind them."""
        lengths = attention_mask.sum(1, keepdim=True)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        reversal = torch.where(position < lengths, lengths - 1 - position, position)
        ahead, _ = self.forward_lstm(self.embedding(input_ids))
        back, _ = self.backward_lstm(self.embedding(input_ids.gather(1, reversal)))
        # the mean does not ask for an order, so the backward states need not be turned round again
        states = torch.cat([ahead, back], dim=2) * attention_mask.unsqueeze(2)
        return self.output(states.sum(1) / lengths)


@dataclass(frozen=True)
class EncodedText:
    """Token indices of labelled rows, as the tokenizer gives them, without padding."""

    features: dict[str, list[list[int]]]
    target: Tensor
    padding: dict[str, int]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row."""
        return np.array([len(row) for row in self.features["input_ids"]], dtype=np.int64)

    def batch(self, rows: Sequence[int] | np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Padded inputs {name: (n, T)} and targets (n,) of the given rows."""
        inputs = {}
        for name, values in self.features.items():
            padded = pad_sequence(
                [torch.tensor(values[row]) for row in rows], batch_first=True, padding_value=self.padding[name]
            )
            inputs[name] = padded.to(device)
        return inputs, self.target[torch.as_tensor(rows)].to(device)

    def take(self, rows: np.ndarray) -> EncodedText:
        """The given rows, in the given order."""
        features = {name: [values[row] for row in rows] for name, values in self.features.items()}
        return EncodedText(features, self.target[torch.as_tensor(rows)], self.padding)

    def fingerprint(self) -> str:
        """SHA-256 of tokens and targets."""
        digest = hashlib.sha256(json.dumps(self.features).encode())
        digest.update(self.target.numpy().tobytes())
        return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide bars, and the warning that the classification layer is new, which it is meant to be."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class ModelFamily:
    """A tokenizer and a way to build fresh models that belong to it."""

    name: str
    tokenizer: Any
    labels: LabelSet
    max_length: int
    paired: bool

    @property
    def from_scratch(self) -> bool:
        """Whether models start from random parameters (the BiLSTM) rather than from pretrained ones."""
        return self.name == BILSTM

    def build(self, seed: int) -> nn.Module:
        """A fresh model; all random parameters follow from ``seed``."""
        torch.manual_seed(seed)
        if self.from_scratch:
            return BiLSTMClassifier(BiLSTMConfig(len(self.tokenizer), len(self.labels.names)))
        from transformers import AutoModelForSequenceClassification

        names = self.labels.names
        with _quiet_transformers():
            return AutoModelForSequenceClassification.from_pretrained(
                self.name,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                ignore_mismatched_sizes=True,
                label2id={name: index for index, name in enumerate(names)},
            )

    def encode(self, data: LabelledText) -> EncodedText:
        """Token indices of the rows, cut at ``max_length`` tokens."""
        if data.paired != self.paired:
            expected, got = ("text pairs", "single texts") if self.paired else ("single texts", "text pairs")
            raise RecipeError(
                f"{data.source}: expected {expected} as in the training data, got {got}; name the "
                "columns with --text-column and --text-pair-column"
            )
        pairs = data.frame["text_pair"].tolist() if self.paired else None
        features = _encode(self.tokenizer, data.frame["text"].tolist(), pairs, self.max_length)
        target = torch.tensor(data.frame["label"].to_numpy(), dtype=torch.int64)
        return EncodedText(features, target, _padding(self.tokenizer, features))

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write model (safetensors), configuration, vocabulary and labels for :func:`load_classifier`."""
        description = {
            "model": BILSTM if self.from_scratch else "transformers",
            "labels": list(self.labels.names),
            "max_length": self.max_length,
            "paired": self.paired,
        }

        def write(temporary: Path) -> None:
            self.tokenizer.save_pretrained(temporary)
            if isinstance(model, BiLSTMClassifier):
                description["config"] = dataclasses.asdict(model.config)
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                save_file(tensors, str(temporary / "model.safetensors"))
            else:
                with _quiet_transformers():
                    model.save_pretrained(temporary)  # type: ignore[operator]
            write_json(temporary / _DESCRIPTION, description)

        write_folder(folder, write)


def _encode(tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int) -> dict[str, list[list[int]]]:
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=True)
    return {name: encoded[name] for name in encoded if name in (*tokenizer.model_input_names, "attention_mask")}


def _padding(tokenizer: Any, names: Any) -> dict[str, int]:
    values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: values.get(name, 0) for name in names}


def word_tokenizer(texts: Sequence[str], max_words: int = 50_000) -> Any:
    """A tokenizer of lower-case words and punctuation marks, with the most frequent ``max_words`` as vocabulary.

    Two texts are joined by a separator token. The vocabulary of 50,000 words is that of 000 (SunGen).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token=_UNKNOWN))
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [_PAD, _UNKNOWN, _SEPARATOR]
    trainer = trainers.WordLevelTrainer(vocab_size=max_words, special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    words.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {_SEPARATOR} $B", special_tokens=[(_SEPARATOR, words.token_to_id(_SEPARATOR))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        sep_token=_SEPARATOR,
        model_input_names=["input_ids", "attention_mask"],
    )


def model_family(name: str, max_length: int, train: LabelledText, *others: LabelledText) -> ModelFamily:
    """Tokenizer and builder of the named model.

    Args:
        name: "bilstm", or a transformers model by folder or id. The BiLSTM's vocabulary is taken from the texts of
            ``train`` and ``others``.
        max_length: number of tokens at which a row is cut.
        train: the data the models will be fitted on; it says which labels there are.
        others: further data to fit on.

    Raises:
        RecipeError: no such model.
    """
    if name == BILSTM:
        texts = [
            text
            for data in (train, *others)
            for column in ("text", "text_pair")
            if column in data.frame
            for text in data.frame[column]
        ]
        tokenizer = word_tokenizer(texts)
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"--model {name}: expected bilstm, or a transformers model by folder or id, got {error}"
            ) from error
        if tokenizer.pad_token_id is None:
            raise RecipeError(
                f"--model {name}: expected a tokenizer with a padding token, got none; choose an encoder "
                "model such as BERT"
            )
    return ModelFamily(name, tokenizer, train.labels, max_length, train.paired)


def tensor_hash(model: nn.Module) -> str:
    """SHA-256 of the model's class and of all its parameters and buffers."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (N, C) of a BiLSTM or a transformers model."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Classifier:
    """A trained model with its tokenizer and labels, as :func:`load_classifier` returns it."""

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int

    @torch.inference_mode()
    def predict_probability(
        self, texts: list[str], text_pairs: list[str] | None = None, batch_size: int = 64
    ) -> np.ndarray:
        """Probabilities (N, C) of the classes ``labels`` for each text."""
        features = _encode(self.tokenizer, texts, text_pairs, self.max_length)
        data = EncodedText(features, torch.zeros(len(texts), dtype=torch.int64), _padding(self.tokenizer, features))
        device = next(self.model.parameters()).device
        batches = [range(start, min(start + batch_size, len(texts))) for start in range(0, len(texts), batch_size)]
        logits = [logits_of(self.model, data.batch(rows, device)[0]) for rows in batches]
        return torch.cat(logits).softmax(1).cpu().numpy()


def load_classifier(folder: str | Path) -> Classifier:
    """Load a model that ``synkern train`` or ``synkern reweight`` saved.

    Args:
        folder: a folder below ``models`` in the output of either command.

    Raises:
        RecipeError: the folder holds no such model.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / _DESCRIPTION).is_file():
        raise RecipeError(
            f"load_classifier: expected a model saved by `synkern train` or `synkern reweight` in {folder}, got no "
            f"{_DESCRIPTION} there; give a folder such as runs/dimp/models/dimp-seed0"
        )
    description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    if description["model"] == BILSTM:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model: nn.Module = BiLSTMClassifier(BiLSTMConfig(**description["config"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    return Classifier(model.eval(), tokenizer, tuple(description["labels"]), description["max_length"])
