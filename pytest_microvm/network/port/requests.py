"""The host's requests to a guest's network process, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

from pytest_microvm.agent.link import GuestError
from pytest_microvm.untrusted.text import sanitize_line
from pytest_microvm.wire.fields import number_field
from pytest_microvm.wire.frames import WireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.errors import MachineError


class NetworkRequests:
    """The requests that the guest has not answered yet.

    Args:
        send: Sends a message to the guest.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count(1)

    async def ask(self, **body: Any) -> None:
        """Send a request and wait until the guest has done it.

        Raises:
            GuestError: The guest replied with an error.
            MachineError: The requests were ended by :meth:`fail`.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send({"id": number, **body})
        await answer

    def answered(self, body: dict[str, Any]) -> None:
        """End the request that a message of the guest answers.

        Raises:
            WireError: No such request waits for an answer.
        """
        request = self._waiting.pop(number_field(body, "id"), None)
        if request is None:
            raise WireError("an answer to no request")
        if request.done():  # the caller has stopped waiting
            return
        error = body.get("error")
        if isinstance(error, dict):
            kind, message = str(error.get("type"))[:200], str(error.get("message"))[:1000]
            request.set_exception(GuestError(sanitize_line(kind), sanitize_line(message)))
        else:
            request.set_result(None)

    def fail(self, failure: MachineError) -> None:
        """Raise ``failure`` in all callers that wait."""
        for request in self._waiting.values():
            if not request.done():
                request.set_exception(failure)
