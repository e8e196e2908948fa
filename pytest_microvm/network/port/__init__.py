"""The host's end of a guest's network port: streams to the proxy and port forwarding into the guest."""
