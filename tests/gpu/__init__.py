"""Checks of a device: of the CPU in small sizes, of a GPU by ``pytest -m gpu tests/gpu``."""
