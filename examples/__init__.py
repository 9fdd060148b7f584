"""Runnable examples: start one with `python -m examples.<name>`."""
