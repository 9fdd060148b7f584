"""A reward computed by a separate service over HTTP."""
