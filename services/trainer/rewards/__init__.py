"""Was it good? From completions to rewards."""
