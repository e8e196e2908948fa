"""Show progress: a line that moves on a terminal, plain lines in a log."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Progress:
    """Shows the current stage when called; inside ``with``, a terminal shows it on one line with its time.

    Args:
        file: The output stream.
        terminal: Whether ``file`` is a terminal.
        prefix: Put before every line.
    """

    def __init__(self, file: IO[str], *, terminal: bool, prefix: str = "") -> None:
        self._file = file
        self._terminal = terminal
        self._prefix = prefix
        self._inside = 0
        self._display: Any = None

    def __enter__(self) -> Self:
        self._inside += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self._inside -= 1
        if self._display is not None and not self._inside:
            self._display.stop()
            self._display = None

    def __call__(self, doing: str) -> None:
        """Show ``doing``, which must be safe to print."""
        text = self._prefix + doing
        if not self._terminal or not self._inside:
            self._file.write(text + "\n")
            self._file.flush()
        elif self._display is None:
            self._display = _display(self._file)
            self._display.start()
            self._display.add_task(text, total=None)
        else:
            self._display.update(self._display.task_ids[0], description=text)


def _display(file: IO[str]) -> Any:
    """Return rich's display of one task: spinner, description, elapsed time; erased when it ends."""
    from rich.console import Console  # noqa: PLC0415 - only where something takes long, on a terminal
    from rich.progress import Progress as Display  # noqa: PLC0415
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Display(*columns, console=Console(file=file, force_terminal=True), transient=True)
