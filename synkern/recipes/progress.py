"""Progress bars with time left: one over everything, one over the current epoch."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """Two bars on standard error, shown in a terminal only; messages are printed above them.

    Args:
        show: False hides bars and messages.
    """

    def __init__(self, show: bool = True) -> None:
        self._show = show
        # disable=None hides a bar where standard error is not a terminal
        self._disable = None if show else True
        self._overall = tqdm(total=0, desc="all", unit="step", position=0, disable=self._disable, dynamic_ncols=True)
        self._epoch: tqdm | None = None

    def expect(self, steps: int) -> None:
        """Say how many steps everything that will be trained has."""
        self._overall.total = steps
        self._overall.refresh()

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run did, without letting them into the estimate of the time left."""
        if not self._overall.disable:
            self._overall.initial += steps
        self._overall.update(steps)

    def start_epoch(self, description: str, steps: int, done: int = 0) -> None:
        """Show a new lower bar of ``steps`` steps, of which ``done`` are done."""
        self.end_epoch()
        self._epoch = tqdm(
            total=steps,
            initial=done,
            desc=description,
            unit="step",
            position=1,
            leave=False,
            disable=self._disable,
            dynamic_ncols=True,
        )

    def step(self) -> None:
        """Count one step in both bars."""
        self._overall.update()
        if self._epoch is not None:
            self._epoch.update()

    def end_epoch(self) -> None:
        """Remove the lower bar."""
        if self._epoch is not None:
            self._epoch.close()
            self._epoch = None

    def write(self, message: str) -> None:
        """Print a line above the bars."""
        if self._show:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Remove both bars."""
        self.end_epoch()
        self._overall.close()
