"""A client of the Debug Adapter Protocol, as an IDE is: no more of it than a debugging session needs.

Source: https://microsoft.github.io/debug-adapter-protocol/specification.
"""

import contextlib
import itertools
import json
import re
import socket
import time
from pathlib import Path

from support import guards

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "debug-failures.md"


def files_of_the_how_to():
    """Return the files that the how-to guide makes, by name."""
    blocks = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    return dict(blocks)


def launch_configuration(folder, port):
    """Return the IDE's configuration of the how-to guide, for a project and a port.

    Args:
        folder: The project, which the IDE calls its workspace.
        port: The port instead of the guide's.
    """
    (configuration,) = json.loads(files_of_the_how_to()[".vscode/launch.json"])["configurations"]
    text = json.dumps(configuration).replace("${workspaceFolder}", str(folder)).replace("5678", str(port))
    return json.loads(text)


class DebugAdapterClient:
    """A connection to a debug adapter.

    Args:
        port: The port of this computer's loopback at which it listens, sooner or later.
        process: What makes it listen; it must not end before.
    """

    def __init__(self, port, process):
        self._numbers = itertools.count(1)
        self._events = []
        self._answers = {}
        while (connection := self._connect(port)) is None:
            assert process.poll() is None, "the suite has ended"
            time.sleep(0.1)  # as an IDE's user, who tries again
        self._connection = connection
        self._stream = connection.makefile("rb")

    def _connect(self, port):
        """Return a connection on which the adapter has said its first event; ``None``: not yet."""
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=guards.SUITE)
        except OSError:
            return None
        try:
            if connection.recv(1, socket.MSG_PEEK):  # the forwarding computer accepts before the machine does
                return connection
        except OSError:
            pass
        connection.close()
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self._stream.close()
        self._connection.close()

    def send(self, command, **arguments):
        """Send a request; return its number."""
        number = next(self._numbers)
        body = json.dumps(
            {"seq": number, "type": "request", "command": command, "arguments": arguments}
        ).encode()
        self._connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return number

    def answer(self, number):
        """Return the body of the answer to a request, which must have succeeded."""
        while number not in self._answers:
            self._receive()
        answer = self._answers.pop(number)
        assert answer["success"], answer
        return answer.get("body", {})

    def ask(self, command, **arguments):
        """Send a request and return the body of its answer."""
        return self.answer(self.send(command, **arguments))

    def event(self, name):
        """Return the body of the next event of that name."""
        while True:
            found = next((event for event in self._events if event["event"] == name), None)
            if found is not None:
                self._events.remove(found)
                return found.get("body", {})
            self._receive()

    def next_stop(self):
        """Return the thread that stops next, and its frame."""
        thread = self.event("stopped")["threadId"]
        return thread, self.ask("stackTrace", threadId=thread)["stackFrames"][0]

    def _receive(self):
        length = 0
        while header := self._stream.readline().strip():
            name, _colon, value = header.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        assert length, "the adapter has ended"
        message = json.loads(self._stream.read(length))
        if message["type"] == "event":
            self._events.append(message)
        elif message["type"] == "response":
            self._answers[message["request_seq"]] = message


@contextlib.contextmanager
def stopped_in_ide(port, process, configuration, file, line):
    """Attach and go on to a breakpoint, as a person does in an IDE; go on from there after the block.

    Args:
        port: The port.
        process: What runs the suite.
        configuration: What ``launch.json`` says.
        file: The file of the breakpoint, as the IDE knows it.
        line: Its line.

    Yields:
        The frame at the breakpoint, and a function that evaluates an expression there.
    """
    with DebugAdapterClient(port, process) as client:
        client.ask("initialize", adapterID="debugpy", clientID="test", linesStartAt1=True, pathFormat="path")
        attached = client.send("attach", **configuration)
        client.event("initialized")
        source, breakpoints = {"path": str(file)}, [{"line": line}]
        (found,) = client.ask("setBreakpoints", source=source, breakpoints=breakpoints)["breakpoints"]
        assert found["verified"], found
        client.ask("configurationDone")
        client.answer(attached)
        thread, frame = client.next_stop()
        while frame["line"] != line:
            client.ask("continue", threadId=thread)
            thread, frame = client.next_stop()

        def evaluate(expression):
            return client.ask("evaluate", expression=expression, frameId=frame["id"], context="repl")[
                "result"
            ]

        yield frame, evaluate
        client.ask("continue", threadId=thread)
