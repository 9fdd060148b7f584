"""A reward that a service of its own computes, over HTTP."""
