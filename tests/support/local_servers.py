"""A server on this computer's loopback that machines download from, plain or over TLS."""

from __future__ import annotations

import http.server
import threading


class LocalServer(http.server.ThreadingHTTPServer):
    """Serves while it is entered.

    Args:
        handler: Answers one connection.
        tls: The certificate to speak TLS with; ``None``: plain.
    """

    request_queue_size = 512
    daemon_threads = True

    def __init__(self, handler, tls=None):
        super().__init__(("127.0.0.1", 0), handler)
        self.port = self.server_address[1]
        if tls is not None:  # each connection's handshake is its own thread's work
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_):
        """Ignore it: a client that goes away is no error."""
