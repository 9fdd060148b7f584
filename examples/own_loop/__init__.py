"""Two training loops of your own: in your process, and over HTTP."""
