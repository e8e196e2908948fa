"""Replies to the host's requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_microvm.wire.channel import Channel


def reply(channel: Channel, number: Any, result: dict[str, Any]) -> None:
    """Reply to request ``number`` with ``result``."""
    channel.send({"id": number, "result": result})


def reply_error(channel: Channel, number: Any, error: BaseException | None) -> None:
    """Reply to request ``number`` with an error."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{message}: {error.filename!r}"
    body = {
        "type": type(error).__name__,
        "message": message[:4000],
        "errno": getattr(error, "errno", 0) or 0,
    }
    channel.send({"id": number, "error": body})
