"""Benchmarks, run from a checkout: ``python -m benchmarks.step`` and so on.

Their findings are ratios and exponents within one run, since absolute times say little on another machine.
"""
