"""Checks and benches of a device, by ``python -m tests.gpu``; they need neither pytest nor the optional packages."""
