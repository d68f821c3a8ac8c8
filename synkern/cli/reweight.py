"""``synkern reweight``."""

from __future__ import annotations

import typer

from synkern.cli import options
from synkern.recipes.settings import ReweightSettings


@options.takes(ReweightSettings)
def reweight(ctx: typer.Context) -> None:
    """Find out which training rows deserve trust, from the rows alone, and train on the result.

    SunGen (Gao et al., 2023) learns a weight for every row of a data set that a language model wrote: it trains a small
    model with the weights, looks at a robust loss of that model on a sample of the same rows, and moves the weights
    along the meta-gradient. Writes results.json, table.md, plots, the weight of every row, rows.md (rows of least and
    greatest weight), subset.jsonl and the trained models to --out; where the right labels are known, also how well
    wrong ones are found. The paper has a million rows; what small data change is said at --outer-size,
    --inner-batch-size, --class-balance and --paper-scale.
    """
    with options.readable_errors("reweight", ctx.params["out"]):
        from synkern.recipes.reweight import METHODS, run_reweight
        from synkern.recipes.reweight_plots import FILES
        from synkern.recipes.reweight_report import TABLE

        settings = options.settings_from(ctx, ReweightSettings, METHODS, ("train", "test"))
        results = run_reweight(settings, resume=ctx.params["resume"], overwrite=ctx.params["overwrite"])
        options.print_results(results, settings.folder, TABLE, FILES)
