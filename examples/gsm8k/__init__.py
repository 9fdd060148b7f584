"""Word problems with a verifiable reward: math-verify checks the final answer."""
