"""What may be said between the services: wire types, errors, the adapter file and the clients."""
