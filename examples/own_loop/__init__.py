"""Two ways to write your own training loop: in your process, and over HTTP."""
