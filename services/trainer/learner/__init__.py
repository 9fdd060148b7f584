"""How should the policy change? Optimizer, update, critic and statistics."""
