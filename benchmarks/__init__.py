"""Benchmarks: figures as ratios and shapes within one run, on the machine at hand. ``dist-obdsd bench NAME``.

Each has a module of its name here with ``run(options) -> rows``, where ``options`` are the command line's, ``PLOT`` for
``report.plot`` and, where rows together say something, ``findings(rows)``, figures by name.
"""
