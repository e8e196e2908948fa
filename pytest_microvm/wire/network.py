"""Messages and limits of the port ``network``, for both of its ends.

Guest to host: ``{"event": "connect", "connection": n}`` requests a connection to the proxy; ``{"event":
"reset", "stream": s}`` reports that a socket failed; ``{"event": "packet", "protocol", "address", "port",
"name"}`` reports a packet that tried to bypass the proxy.

Host to guest: ``{"op": "accept", "connection": n, "stream": s}`` or ``{"op": "refuse", "connection": n}``
answers ``connect``. ``{"id": k, "op": "connect", "stream": s, "port": p}`` (or ``"path"``) opens a
connection to a server in the guest, ``{"id": k, "op": "wait", "port": p, "timeout": t}`` waits until a server
listens; ``{"id": k, "op": "share", "stream": s, "path": p, "read_only": r}`` mounts a directory of the host
(the stream carries its FUSE requests and responses), ``{"id": k, "op": "unshare", "stream": s}`` unmounts it;
``{"id": k, "op": "rest"}`` returns the guest's end to its initial state. The guest answers operations that
have an ``id`` with a ``result`` or an ``error``. ``{"op": "end", "stream": s}`` means that the host reads no
more, ``{"op": "reset", "stream": s}`` drops a connection at once.

CLOSE ends one direction. Neither end sends anything, its hello included, before it has to.
"""

WINDOW = 64 * 1024
"""Bytes in flight on a stream; hundreds of windows must fit into a small guest's memory."""

CONNECTIONS = 500
"""Maximum open connections from the guest to the proxy, and again from the host to the guest; a channel
holds twice as many streams."""

PORT = 3128
"""TCP port of the proxy on the guest's 127.0.0.1."""
