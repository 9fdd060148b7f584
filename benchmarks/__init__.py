"""Each benchmark prints a ratio against a peer, both sides measured in one run."""
