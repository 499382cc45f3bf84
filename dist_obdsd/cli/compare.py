"""``dist-obdsd compare``."""

import argparse
import os
import shlex

from dist_obdsd.cli.output import check_writable, show, write_json
from dist_obdsd.errors import RunError
from dist_obdsd.experiments.run_status import status_of
from dist_obdsd.experiments.runs import Comparison
from dist_obdsd.training.preemption import PreemptionHandler


def compare(options: argparse.Namespace) -> int:
    """Train the runs that are not finished, and report how far the variants differ."""
    check_writable(options.json)
    flags = [flag for flag in ("--quiet", "--verbose") if getattr(options, flag[2:])]
    words = [word for word in options.arguments if word != "--report-only"]  # to reproduce it is to train
    comparison = Comparison(
        options.config, options.overrides, options.variants, options.seeds, options.grid, ranks=options.ranks,
        out=options.out, flags=flags, command_line=shlex.join(["dist-obdsd", *words]),
    )  # fmt: skip
    if options.dry_run:
        for spec, line in zip(comparison.specs, comparison.commands(), strict=True):
            show(f"{status_of(spec).state:12s}  {line}")
        return 0
    if options.jobs:
        show("\n".join(comparison.commands(tracked=True)))
        return 0
    with PreemptionHandler().installed() as stop:
        report = comparison.report() if options.report_only else comparison.train(stop)
    if report is not None:
        if options.json is not None:
            write_json(options.json, report.meta(), report.rows)
        show(f"\n{report.headline()}\n\nreport: {comparison.folder / 'report.md'}")
    missing, runs = comparison.missing, len(comparison.specs)
    if stop.requested:
        show(f"stopped by {stop.reason} with {len(missing)} of {runs} runs to go; the same command goes on")
        return os.EX_TEMPFAIL
    if missing:
        names = ", ".join(f"{status.spec.run_dir} {status.state}" for status in missing)
        raise RunError(
            f"{len(missing)} of {runs} runs are not finished ({names}); see their errors above and in their "
            f"status.json; the same command goes on with them"
        )
    return 0
