"""`make demo`: two services train a policy over HTTP on this machine, from nothing."""
