"""What is shown while something takes long."""

import io

from pytest_microvm.terminal.progress import Progress


def test_a_log_gets_a_line_each():
    file = io.StringIO()
    with Progress(file, terminal=False, prefix="microvm: ") as progress:
        progress("booting")
        progress("collecting")
    assert file.getvalue() == "microvm: booting\nmicrovm: collecting\n"


def test_a_terminal_gets_one_line_that_goes_when_it_is_done():
    file = io.StringIO()
    with Progress(file, terminal=True) as progress:
        progress("booting [python]")
        progress("collecting")
    shown = file.getvalue()
    assert "booting [python]" in shown  # as it is written: no markup is read in it
    assert "collecting" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_outside_a_terminal_gets_lines_too():
    file = io.StringIO()
    progress = Progress(file, terminal=True)
    with progress:
        progress("booting")
    begin = len(file.getvalue())
    progress("waiting")
    assert file.getvalue()[begin:] == "waiting\n"


def test_within_another():
    file = io.StringIO()
    with Progress(file, terminal=True) as progress:
        with progress:
            progress("booting")
        progress("collecting")
    assert "collecting" in file.getvalue()
