"""Exchange of prepared templates between a run's workers: made once, reused wherever the key is the same.

Workers of a cluster can reach each other anyway (Dask moves results so), and request templates directly from
one another. This is only an optimization: a worker makes a template that it cannot fetch.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable
from typing import Any

from distributed import Worker

from pytest_microvm.errors import HostError
from pytest_microvm.templates.moving import lent, piece, receive
from pytest_microvm.templates.store import Template, TemplateStore

_PATIENCE = 60.0  # seconds to wait for a response
_log = logging.getLogger("pytest_microvm")


class Lender:
    """Serves this computer's templates to other workers; they are kept until the run is over.

    Args:
        store: This computer's templates.
    """

    def __init__(self, store: TemplateStore) -> None:
        self._store = store
        self._held: dict[str, Template] = {}

    def describe(self, key: str) -> dict[str, Any] | None:
        """Return a template's metadata, ``None`` if this computer does not have it."""
        if key not in self._held:
            template = lent(self._store, key)
            if template is None:
                return None
            self._held[key] = template
        return self._held[key].meta

    def piece(self, key: str, name: str, place: int) -> tuple[int, bytes]:
        """Return the next piece of a template's file; see :data:`pytest_microvm.templates.moving.Fetch`."""
        return piece(self._held[key], name, place)

    def close(self) -> None:
        """Release the served templates, so that they can be removed again."""
        while self._held:
            self._held.popitem()[1].close()


class Borrower:
    """Fetches templates from other workers.

    Args:
        worker: This worker.
        describe: ``describe(run, key)``, called on the other workers.
        piece: ``piece(run, key, name, place)``, called likewise.
        run: The run's id.
    """

    def __init__(
        self, worker: Worker, describe: Callable[..., Any], piece: Callable[..., Any], run: str
    ) -> None:
        self._worker = worker
        self._describe = describe
        self._piece = piece
        self._run = run

    def fetch(self, key: str, store: TemplateStore) -> bool:
        """Fetch the template ``key`` into a store; return True if another worker had it."""
        for address in self._others():
            try:
                meta = self._call(address, self._describe, key)
                if meta is not None:
                    _log.info("template %s comes from %s", key[:12], address)
                    receive(
                        store, key, meta, lambda *what, of=address: self._call(of, self._piece, key, *what)
                    )
                    return True
            except (HostError, OSError, TimeoutError, KeyError) as error:
                _log.warning("template %s cannot be had from %s: %s", key[:12], address, error)
        return False

    def _others(self) -> list[str]:
        try:
            identity = self._wait(self._worker.scheduler.identity(n_workers=-1))
        except (OSError, TimeoutError):
            return []
        return [address for address in identity["workers"] if address != self._worker.address]

    def _call(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on another worker; its response is trusted, for this package produced it."""
        packed = pickle.dumps((self._run, *arguments))
        answer = self._wait(self._worker.rpc(address).run(function=pickle.dumps(function), args=packed))
        if answer["status"] != "OK":
            raise HostError(f"worker {address} failed: {answer.get('text', '')}", resolution="see its log")
        return answer["result"]

    def _wait(self, answer: Any) -> Any:
        async def within_time() -> Any:
            return await asyncio.wait_for(answer, _PATIENCE)

        loop = self._worker.loop.asyncio_loop  # type: ignore[attr-defined]  # Tornado's, on top of asyncio's
        return asyncio.run_coroutine_threadsafe(within_time(), loop).result()
