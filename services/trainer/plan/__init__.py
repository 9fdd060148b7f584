"""The memory planner: `python -m services.trainer plan`; arithmetic alone, without torch or GPU."""
