"""Write ``summary.md`` and ``summary.html``, a run's readable summaries."""

from __future__ import annotations

from pathlib import Path

from pytest_microvm.ci.results.overview import failed_tests
from pytest_microvm.ci.results.result import RunResult
from pytest_microvm.ci.results.summary_html import summary_html
from pytest_microvm.ci.results.summary_markdown import summary_markdown


def write_summary(output: Path, run: RunResult) -> None:
    """Write both summaries into the run's folder, which must already have the tasks' reports.

    Args:
        output: The folder.
        run: The run's result.

    Raises:
        OSError: A summary cannot be written.
    """
    failed = {task.id: failed_tests(output, task) for task in run.tasks}
    (output / "summary.md").write_text(summary_markdown(run, failed), encoding="utf-8")
    (output / "summary.html").write_text(summary_html(output, run, failed), encoding="utf-8")
