"""States as one safetensors file, and signals that end a training at a step from which it can go on.

A state is a tree of dictionaries, lists, numbers, strings, tensors and numpy arrays. Its tensors become the tensors of
the file, the rest becomes JSON in the file's metadata: one file, so one rename makes the whole state appear, and no
pickle.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from synkern.recipes.errors import RecipeError
from synkern.recipes.files import write_atomic

_TENSOR, _PAIRS = "$tensor", "$pairs"


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        # clone: safetensors refuses tensors that share memory
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        # JSON would turn the integer keys of an optimizer's state into strings
        return {_PAIRS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save_state: a state holds tensors, numbers, strings, lists and dictionaries, got {type(value)}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _PAIRS in value:
            return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state to ``path`` atomically.

    Args:
        path: a name that ends in ``.safetensors``.
        state: a tree of dictionaries, lists, numbers, strings, tensors and numpy arrays.

    Raises:
        TypeError: the tree holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"state": json.dumps(_pack(state, tensors))}
    write_atomic(path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata))


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; tensors (and what were numpy arrays) come back as tensors on the CPU.

    Raises:
        RecipeError: the file is not such a state.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _unpack(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise RecipeError(
            f"{path}: expected a state saved by synkern, got {error}; delete it and start again"
        ) from error


class Interrupted(KeyboardInterrupt):
    """Training ended on a signal, after its state was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignal:
    """While open, the first SIGINT or SIGTERM is remembered; a second one acts at once.

    A training loop asks :attr:`signum` between two steps, saves its state and raises :class:`Interrupted`. Signals
    can be caught in the main thread only: in another one nothing is remembered.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
