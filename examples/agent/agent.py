"""A coding agent without a mind of its own: it asks a model API what to do, does it, and commits.

It knows nothing of microVMs. It works in the current folder, as any program with a shell could.

python agent.py "make the tests pass"
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

URL = "https://api.model.example/v1/next"
MOST_STEPS = 20


def ask(task, results):
    """Tell the model what has come of its steps so far, and return the next one."""
    request = urllib.request.Request(
        URL,
        data=json.dumps({"task": task, "results": results}).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['MODEL_API_KEY']}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def write(path, text):
    Path(path).write_text(text)
    return f"wrote {len(text)} characters"


def fetch(url, data=None):
    try:
        with urllib.request.urlopen(url, data and data.encode(), timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.URLError as error:
        return f"failed: {error}"


TOOLS = {"read": lambda path: Path(path).read_text(), "write": write, "run": run, "fetch": fetch}


def main():
    results = []
    for _ in range(MOST_STEPS):
        step = ask(sys.argv[1], results)
        print(step["say"], flush=True)
        if step["tool"] == "done":
            return 0
        results.append(TOOLS[step["tool"]](*step["arguments"]))
    print("giving up", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
