"""File transfers of the agent, each on a short-lived thread of its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.files import StreamReader, StreamWriter, pack, unpack
from pytest_microvm.guest.replies import reply, reply_error
from pytest_microvm.guest.root_changes import pack_root_changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.guest.port import Port

_PIECE = 65536  # bytes


class Transfers:
    """The file transfers that are in progress.

    Args:
        port: The connection to the host.
        changed: Guards the port and the transfers; notified after each message of the host.
    """

    def __init__(self, port: Port, changed: threading.Condition) -> None:
        self.port = port
        self.changed = changed
        self.by_stream: dict[int, Transfer] = {}

    def data(self, stream: int, data: bytes) -> None:
        """Buffer bytes from the host."""
        if stream in self.by_stream:
            self.by_stream[stream].received += data

    def closed(self, stream: int) -> None:
        """Record that the host has closed its side of a stream."""
        if stream in self.by_stream:
            self.by_stream[stream].ended = True

    def abort(self) -> None:
        """End all transfers: their host is gone."""
        for transfer in self.by_stream.values():
            transfer.ended = True

    def read(self, body: dict[str, Any]) -> None:
        """Send a file."""

        def work(transfer: Transfer) -> None:
            with open(body["path"], "rb") as file:
                while data := file.read(_PIECE):
                    transfer.write(data)

        self._start(body, work)

    def write(self, body: dict[str, Any]) -> None:
        """Receive a file."""

        def work(transfer: Transfer) -> None:
            with open(body["path"], "ab" if body.get("append") else "wb") as file:
                while data := transfer.read():
                    file.write(data)

        self._start(body, work)

    def pack(self, body: dict[str, Any]) -> None:
        """Send a file or folder as a tar stream."""
        self._start(body, lambda transfer: pack(body["path"], StreamWriter(transfer.write)))

    def root_changes(self, body: dict[str, Any]) -> None:
        """Send the changes of the root file system as a tar stream."""
        self._start(body, lambda transfer: pack_root_changes(StreamWriter(transfer.write)))

    def unpack(self, body: dict[str, Any]) -> None:
        """Receive a tar stream into a folder."""
        self._start(body, lambda transfer: unpack(StreamReader(transfer.read), body["path"]))

    def _start(self, body: dict[str, Any], work: Callable[[Transfer], None]) -> None:
        """Run ``work`` on a thread with the request's stream, and reply when it is done."""
        stream = body["stream"]
        self.port.channel.open(stream)
        transfer = self.by_stream[stream] = Transfer(self, stream)

        def run() -> None:
            failure: BaseException | None = None
            try:
                work(transfer)
            except Exception as error:  # noqa: BLE001 - any failure is the request's answer
                failure = error
            transfer.close()
            with self.changed:
                if failure is None:
                    reply(self.port.channel, body["id"], {})
                else:
                    reply_error(self.port.channel, body["id"], failure)
                self.port.flush()

        threading.Thread(target=run, daemon=True).start()


class Transfer:
    """A stream that a file transfer's thread reads or writes with blocking calls."""

    def __init__(self, transfers: Transfers, stream: int) -> None:
        self.received = bytearray()
        self.ended = False  # the host has closed its side
        self._transfers = transfers
        self._stream = stream
        self._channel = transfers.port.channel

    def read(self) -> bytes:
        """Wait for bytes and return those received; b"" at the end."""
        changed = self._transfers.changed
        with changed:
            changed.wait_for(lambda: self.received or self.ended)
            data = bytes(self.received)
            self.received.clear()
            self._channel.consumed(self._stream, len(data))
            self._transfers.port.flush()
        return data

    def write(self, data: bytes) -> None:
        """Send all of ``data``, waiting for the host's credit."""
        changed = self._transfers.changed
        view = memoryview(data)
        while view:
            with changed:
                if self.ended:
                    raise BrokenPipeError("the host stopped reading")
                sent = self._channel.write(self._stream, bytes(view[:_PIECE]))
                self._transfers.port.flush()
                if not sent:
                    changed.wait()
            view = view[sent:]

    def close(self) -> None:
        """End this side of the stream."""
        with self._transfers.changed:
            self._channel.close(self._stream)
            self._transfers.by_stream.pop(self._stream, None)
            self._transfers.port.flush()
