"""Each example runs: `python -m examples.<name>`."""
