"""What GitHub's runner is told on the output of a step, and in files; read as the runner reads it."""

import io
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.ci.github.commands import MOST_ANNOTATIONS, Annotation, fitting, stopped
from pytest_microvm.ci.github.files import SUMMARY_LIMIT, add_summary, set_outputs, shortened
from pytest_microvm.errors import UsageError
from support.github.runner import Commands, RunnerError, file_commands

HOSTILE = [
    "::error::forged",
    "  ::ERROR file=a::forged",
    "text ##[warning]forged",
    "::stop-commands::mine",
    "::mine::",
    "::set-output name=exit-code::0",
    "::add-mask::a",
    "::::",
    "##[endgroup]",
]


@contextmanager
def file_named_by(variable):
    """A file for each example."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, str(Path(folder, "file")))
        yield Path(folder, "file")


def obeyed(text):
    commands = Commands()
    for line in text.splitlines():
        commands.feed(line)
    return commands.obeyed


def test_the_runner_would_obey():
    assert [command.name for command in obeyed("\n".join(HOSTILE[:3]))] == ["error", "ERROR", "warning"]


@pytest.mark.parametrize("end", ["\n", ""], ids=["a whole line", "a broken line"])
def test_it_obeys_nothing_in_between(end):
    output = io.StringIO()
    with stopped(output):
        output.write("\n".join(HOSTILE) + end)
    output.write("::notice::ours\n")
    assert [command.name for command in obeyed(output.getvalue())] == ["remove-matcher", "notice"]


def test_it_obeys_again_after_an_error():
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt), stopped(output):
        raise KeyboardInterrupt
    output.write("::notice::ours\n")
    assert obeyed(output.getvalue())[-1].data == "ours"


def test_the_word_is_another_one_each_time():
    first, second = io.StringIO(), io.StringIO()
    for output in (first, second):
        with stopped(output):
            pass
    assert first.getvalue() != second.getvalue()


@given(title=st.text(max_size=100), message=st.text(max_size=300), file=st.text(max_size=60))
def test_annotation_with_any_text_is_one_command(title, message, file):
    annotation = Annotation("error", message, title, file, 7)
    [command] = obeyed(annotation.command())
    assert command.name == "error"
    assert set(command.properties) <= {"file", "line", "title"}
    assert command.properties.get("line", "7") == "7"
    assert "\r" not in annotation.command()
    assert "\n" not in annotation.command()


def test_annotation_text_survives_escaping():
    [command] = obeyed(Annotation("error", "50% of\na: b, c", "a, b: c", "tests/test_a.py", 3).command())
    assert command.data == "50% of\na: b, c"
    assert command.properties == {"file": "tests/test_a.py", "line": "3", "title": "a, b: c"}


def test_a_line_needs_a_file():
    assert Annotation("notice", "text", line=3).command() == "::notice::text"


def test_no_more_annotations_than_are_shown():
    many = [Annotation("error", str(number)) for number in range(25)]
    few = [Annotation("warning", str(number)) for number in range(MOST_ANNOTATIONS)]
    found = fitting([*many, *few], "the summary")
    assert [one.message for one in found if one.level == "error"] == [
        *"012345678",
        "16 more: see the summary",
    ]
    assert [one for one in found if one.level == "warning"] == few


@given(
    value=st.text(alphabet=st.characters(exclude_characters="\r", exclude_categories=["Cs"]), max_size=200)
)
def test_a_value_sets_its_own_output_alone(value):
    with file_named_by("GITHUB_OUTPUT") as file:
        set_outputs({"first": value, "second": "2"})
        assert file_commands(file.read_text(encoding="utf-8")) == {"first": value, "second": "2"}


def test_outside_of_github(monkeypatch):
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    with pytest.raises(UsageError, match="no step of a GitHub job"):
        set_outputs({"name": "value"})


def test_the_runner_refuses_what_is_no_output():
    for text in ("name\n", "=\n", "name<<\n", "name<<end\nvalue\n"):
        with pytest.raises(RunnerError):
            file_commands(text)


def test_a_summary_is_cut_where_it_shows(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    add_summary("# Head\n```text\n" + "é" * 100 + "\n" + ("line of text\n" * 200_000) + "```\n")
    written = (tmp_path / "summary").read_bytes()
    assert len(written) <= SUMMARY_LIMIT
    text = written.decode()
    assert "The rest of this summary was cut" in text
    assert text.count("```") % 2 == 0  # the note is not part of the block


@given(text=st.text(max_size=600), limit=st.integers(300, 700))
def test_shortened_is_short(text, limit):
    assert len(shortened(text, limit).encode()) <= limit


def test_what_fits_stays_as_it_is():
    assert shortened("a\nb", 10) == "a\nb"
