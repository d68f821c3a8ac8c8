"""``python -m synkern.cli``: the same as the console script."""

from synkern.cli import app

app()
