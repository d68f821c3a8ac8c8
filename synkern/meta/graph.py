"""The autograd graph behind a tensor: which leaves it is differentiated to, and through which nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Graph:
    """What can be seen of a graph without running it; the inside of a reentrant checkpoint cannot.

    Attributes:
        leaves: tensors in which gradients would accumulate.
        reentrant: whether some part is checkpointed with ``use_reentrant=True``.
        kind: a number for the kinds of nodes and how they follow each other.
    """

    def __init__(self, root: Tensor) -> None:
        self.leaves: list[Tensor] = []
        self._uses: dict[int, list[Any]] = {}
        stack = [] if root.grad_fn is None else [root.grad_fn]
        seen: set[Any] = set(stack)
        kinds = []
        while stack:
            node = stack.pop()
            kinds.append(node.name())
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if type(following).__name__ == "AccumulateGrad":
                    self._use(following.variable, node)  # type: ignore[attr-defined]
                elif following not in seen:
                    seen.add(following)
                    stack.append(following)
        self.reentrant = "CheckpointFunctionBackward" in kinds
        self.kind = hash(tuple(kinds))

    def _use(self, leaf: Tensor, node: Any) -> None:
        if id(leaf) not in self._uses:
            self.leaves.append(leaf)
        self._uses.setdefault(id(leaf), []).append(node)

    def uses(self) -> Iterator[tuple[Tensor, list[Any]]]:
        """Each leaf with the nodes that read it."""
        for leaf in self.leaves:
            yield leaf, self._uses[id(leaf)]
