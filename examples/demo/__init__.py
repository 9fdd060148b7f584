"""`make demo`: two services train a policy from scratch over HTTP on this machine."""
