"""The replicas: which may serve, who gets which request, and the sync of adapters."""
