"""Online DPO: preferences from a judge that compares two completions."""
