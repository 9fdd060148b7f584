"""The policy as a function of tokens, and the versions published of it."""
