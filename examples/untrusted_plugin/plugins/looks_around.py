"""Looks for files, processes and services of the computer that runs it; tells what it found."""

import json
import os
import socket
import sys
from pathlib import Path


def reaches(host, port):
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


wanted = json.load(sys.stdin)
json.dump(
    {
        "files": [path for path in wanted["files"] if Path(path).exists()],
        "processes": [pid for pid in wanted["processes"] if Path(f"/proc/{pid}").exists()],
        "services": [address for address in wanted["services"] if reaches(*address)],
        "devices": [path.name for path in Path("/sys/class/net").iterdir()],
        "user": os.getuid(),
    },
    sys.stdout,
)
