"""What the two services share: wire types, errors, the adapter file and the clients."""
