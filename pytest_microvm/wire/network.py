"""What both ends of the port ``network`` know: its window and how many connections it carries.

Messages of the guest: ``{"event": "connect", "connection": n}`` asks for a way to the proxy; ``{"event":
"reset", "stream": s}`` tells that a socket failed; ``{"event": "packet", "protocol", "address", "port",
"name"}`` tells what tried to get past the proxy. Messages of the host: ``{"op": "accept", "connection": n,
"stream": s}`` or ``{"op": "refuse", "connection": n}`` answer the first. ``{"id": k, "op": "connect",
"stream": s, "port": p}`` (or ``"path"``) opens a connection to a server in the guest, ``{"id": k, "op":
"wait", "port": p, "timeout": t}`` waits until there is one; ``{"id": k, "op": "share", "stream": s, "path":
p, "read_only": r}`` mounts a directory of the host, whose FUSE requests and answers the stream carries, and
``{"id": k, "op": "unshare", "stream": s}`` unmounts it; ``{"id": k, "op": "rest"}`` brings the guest's end
back to where it began. These are answered by a ``result`` or an ``error``. ``{"op": "end", "stream": s}``
says that the host reads no more, ``{"op": "reset", "stream": s}`` drops a connection at once. CLOSE ends
one direction. Neither end says anything, its hello included, before it has to.
"""

WINDOW = 64 * 1024
"""Bytes under way on a stream; hundreds of them must fit into a small guest's memory."""

CONNECTIONS = 500
"""How many the guest may have open towards the proxy, and the host towards the guest; a channel holds twice
as many streams."""

PORT = 3128
"""Where the guest's programs find the proxy, on 127.0.0.1."""
