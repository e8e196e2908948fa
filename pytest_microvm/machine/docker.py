"""A session for the Docker daemon of a machine (extra ``docker``)."""

from __future__ import annotations

from typing import Any

import requests_unixsocket  # type: ignore[import-untyped]  # it has no types
from requests_unixsocket.adapters import UnixAdapter  # type: ignore[import-untyped]

from pytest_microvm.errors import MachineError

MOST_BYTES = 256 * 1024**2
"""Bytes of a response's body that is not streamed."""

_PIECE = 1024**2


class DockerSession(requests_unixsocket.Session):  # type: ignore[misc]
    """A :class:`requests_unixsocket.Session` whose URLs may be paths of Docker's API, such as ``/version``.

    The daemon belongs to the machine and is not trusted. The session connects to nothing but it: a redirect
    is not followed, since it could name a server or a socket of this computer. Bodies are bounded.

    Args:
        url: The daemon's URL on this computer, ``http+unix://SOCKET``.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.trust_env = False  # no proxies and passwords of this computer
        self.url = url
        self.adapters.clear()
        self.mount(f"{url}/", UnixAdapter())

    def request(self, method: str, url: str, *args: Any, **options: Any) -> Any:
        """Send a request; see :meth:`requests.Session.request`."""
        return super().request(method, self.url + url if url.startswith("/") else url, *args, **options)

    def send(self, request: Any, **options: Any) -> Any:
        """Send a prepared request; see :meth:`requests.Session.send`.

        Raises:
            MachineError: The response is not to be streamed, and its body exceeds :data:`MOST_BYTES`.
        """
        streamed = options.pop("stream", self.stream)
        response = super().send(request, stream=True, **options)
        if not streamed:
            response._content = _bounded(response)  # noqa: SLF001 - as the property `content` stores it
            response._content_consumed = True  # noqa: SLF001
        return response

    def get_redirect_target(self, _response: Any) -> None:
        """Return ``None``: redirects are not followed."""


def _bounded(response: Any) -> bytes:
    body = bytearray()
    with response:
        for piece in response.iter_content(_PIECE):
            body += piece
            if len(body) > MOST_BYTES:
                raise MachineError(
                    f"a response of the machine's Docker daemon has more than {MOST_BYTES // 1024**2} MiB",
                    resolution="read it in parts: stream=True",
                )
    return bytes(body)
