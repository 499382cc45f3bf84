"""``dist-obdsd bench``, until the benchmarks are commands of their own."""

import argparse

from dist_obdsd.cli.output import check_writable, write_json


def bench(options: argparse.Namespace) -> int:
    """Measure a part of the system on this machine."""
    import importlib

    from benchmarks import report

    check_writable(options.json, options.plot)
    bench = importlib.import_module(f"benchmarks.{options.name}")
    rows = bench.run(options)
    print(report.table(rows))
    found = bench.findings(rows) if hasattr(bench, "findings") else {}
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    if options.json is not None:
        write_json(options.json, report.meta(options) | found, rows)
    compared = report.against(options.baseline, found, options.tolerance) if options.baseline is not None else []
    if compared:
        print(report.table(compared))
    if options.plot is not None:
        report.plot(options.plot, rows, **bench.PLOT)
    return 1 if any(row["verdict"] == "worse" for row in compared) else 0
