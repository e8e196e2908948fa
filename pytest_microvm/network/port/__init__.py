"""The host's end of a guest's network port: streams to the proxy, ports forwarded into the guest."""
