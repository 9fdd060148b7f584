"""Word problems with a verifiable reward: the final answer is checked by math-verify."""
