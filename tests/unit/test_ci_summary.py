"""Summaries of a run: what they say, and that nothing a branch is called or prints acts in them."""

import base64
import hashlib
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pytest_microvm.ci.results import summary_html, summary_markdown
from pytest_microvm.ci.results.overview import duration, local_command
from pytest_microvm.ci.results.result import VERDICTS, Counts, RunResult, TaskResult
from pytest_microvm.ci.results.summary import write_summary
from pytest_microvm.reports.profiles import PROFILES
from pytest_microvm.reports.values import Case, Problem, Suite
from pytest_microvm.reports.writing import write_report

DONE = {"attempts": 1, "seconds": 75.2, "phases": {"queue": 0.1, "run": 3.25}}
HOSTILE = (
    "x` | [link](http://evil.example) ![i](http://evil.example) <img src=x onerror=alert(1)> </pre></code>"
    "</details><script>alert(1)</script> @octocat #12 http://evil.example ```\n```\n# heading\n\n~~~\n"
    "| a | b |\\|"
    " ::error::x &lt;b&gt; \x1b[31m\u202e $`x`$ **bold**"
)


def task(branch="main", job="unit", verdict="passed", **more):
    return TaskResult(f"{len(branch)}.{job}", branch, "c" * 40, job, verdict, **{**DONE, **more})


@pytest.fixture
def summary(tmp_path):
    """Write both summaries of some tasks and return them as text."""

    def write(*tasks, failing=(), interrupted=False):
        for one in tasks:
            (tmp_path / one.id).mkdir(exist_ok=True)
            if failing:
                write_report(
                    tmp_path / one.id / "junit.xml", [Suite("s", tuple(failing))], PROFILES["generic"]
                )
        run = RunResult(
            "20261122-x", "/r", "main:pyproject.toml (1a2b3c4)", 1.7e9, 75.2, tuple(tasks), interrupted
        )
        write_summary(tmp_path, run)
        return (tmp_path / "summary.md").read_text(), (tmp_path / "summary.html").read_text()

    return write


# What they say

FAILED = Case(
    "c", "test_bad", "tests/test_a.py", 7, problems=(Problem("failure", "assert 1 == 2", "the traceback"),)
)


def test_a_matrix_of_branches_and_jobs(summary):
    markdown, html = summary(
        task("main", tests=Counts(passed=9, skipped=1)),
        task("main", "lint"),
        task("other", verdict="failed", tests=Counts(passed=1, failed=1, errors=1, flaky=1)),
    )
    assert "# 2 of 3 jobs passed\n" in markdown
    assert "Jobs from `main:pyproject.toml (1a2b3c4)`, 1 min 15 s, exit status 1.\n" in markdown
    assert (
        "| branch | `unit` | `lint` |\n|---|---|---|\n"
        "| `main` | ✅ passed<br>10 tests, 1 skipped, 1 min 15 s | ✅ passed<br>1 min 15 s |\n"
        "| `other` | ❌ failed<br>3 tests, 2 failed, 1 flaky, 1 min 15 s |  |\n"
    ) in markdown
    assert "<h1>2 of 3 jobs passed</h1>" in html
    assert '<th scope="row"><code>other</code></th>' in html


def test_what_failed_and_what_to_do(summary):
    markdown, html = summary(
        task("main", "test (python=3.12)", "failed", reason="pytest: exit status 1"),
        failing=[FAILED, Case("c", "test_good")],
    )
    for text in (markdown, html):
        for said in (
            "pytest: exit status 1", "pytest-microvm ci run --branch main --job test",
            "c :: test_bad", "tests/test_a.py:7", "the traceback",
        ):  # fmt: skip
            assert said in text
        assert "good" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).replace(
            'class="verdict good"', ""
        )
    assert '<a href="4.test%20%28python%3D3.12%29/junit.xml">junit.xml</a>' in html


def test_summary_lists_denied_connections_of_a_passed_job(summary):
    for text in summary(task(denied=tuple(f"GET http://evil.example/{number}" for number in range(150)))):
        assert "Denied (150)" in text
        assert "http://evil.example/19" in text
        assert "left out]" in text


def test_times(summary):
    markdown, html = summary(task())
    assert "| `main / unit` | 0.1 s |  |  |  | 3.2 s |  | 1 |" in markdown
    assert '<rect class="phase-run"' in html


@pytest.mark.parametrize("verdict", VERDICTS)
def test_signs_need_no_font(summary, verdict):
    _, html = summary(task(verdict=verdict))
    assert html.count('<svg class="sign"') > 0
    assert re.search("[\u2190-\u2bff\U0001f000-\U0001ffff]", html) is None


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_is_a_word(summary, verdict):
    for text in summary(task(verdict=verdict, allow_failure=True)):
        assert f" {verdict}" in text
        assert (" (allowed)" in text) == (verdict != "passed")


@pytest.mark.parametrize(
    ("tasks", "interrupted", "headline"),
    [
        ((task(),), False, "The job passed"),
        ((task(), task(job="b")), False, "All 2 jobs passed"),
        ((task(), task(job="b", verdict="cancelled")), True, "Interrupted: 1 of 2 jobs passed"),
        ((), False, "All 0 jobs passed"),
    ],
)
def test_headlines(summary, tasks, interrupted, headline):
    for text in summary(*tasks, interrupted=interrupted):
        assert headline in text


@pytest.mark.parametrize(
    ("branch", "command"),
    [
        ("main", "pytest-microvm ci run --branch main --job unit"),
        ("worktree", "pytest-microvm ci run --worktree --job unit"),
        ("refs/pull/7/head", "pytest-microvm ci run --ref refs/pull/7/head --job unit"),
        ("a;id", "pytest-microvm ci run --branch 'a;id' --job unit"),
    ],
)
def test_the_command_for_one_job(branch, command):
    assert local_command(task(branch)) == command
    assert branch in shlex.split(command) or branch == "worktree"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (3723, "62 min 3 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# What a branch chooses does not act

OUR_HTML = {"<br>", "<details><summary>All it says</summary>\n", "</details>\n"}


def check_markdown(text):
    """Check that nothing in it is a link, an image or HTML, but what is ours."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        assert token.type != "html_block" or token.content in OUR_HTML, token.content
        for child in token.children or ():
            assert child.type in {
                "text",
                "code_inline",
                "html_inline",
                "strong_open",
                "strong_close",
                "softbreak",
            }
            assert child.type != "html_inline" or child.content in OUR_HTML, child.content
            if child.type == "text":
                assert not re.search(r"@|#\d|http|evil|octocat|<", child.content), child.content


TAGS = (
    "html|head|meta|title|style|body|main|h[123]|p|br|div|table|caption|thead|tbody|tr|th|td|code|pre|span|a"
    "|section|details|summary|ul|li|svg|rect|path"
)
ATTRIBUTES = (
    "lang|charset|http-equiv|content|name|class|id|href|scope|open|aria-hidden|viewbox|preserveaspectratio|x|width"
    "|height|d"
)


class Page(HTMLParser):
    VOID = frozenset({"meta", "br", "rect", "path"})

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.texts = []
        self.links = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert re.fullmatch(TAGS, tag), tag
        assert all(re.fullmatch(ATTRIBUTES, name) for name, _value in attrs), attrs
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check_html(text):
    page = Page(text)
    for link in page.links:
        assert re.fullmatch(r"#?[A-Za-z0-9_.%/-]+", link)
        assert not link.startswith(("/", ".."))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in text
    assert "style=" not in text


def test_a_hostile_branch(summary):
    case = Case(HOSTILE, HOSTILE, HOSTILE, 1, problems=(Problem("failure", HOSTILE, HOSTILE, HOSTILE),))
    one = task(HOSTILE, HOSTILE, "failed", reason=HOSTILE, denied=(HOSTILE,), worker=HOSTILE)
    markdown, html = summary(replace(one, id="a"), failing=[case])
    check_markdown(markdown)
    check_html(html)
    assert "\x1b" not in markdown + html
    assert not re.search("^\\s*::", markdown, re.MULTILINE)


ANY = st.text(st.sampled_from("`|\\[]()<>!#@*_~-=:&;'\"$\n\t a1h.") | st.characters(), max_size=30)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=3 * settings.default.max_examples // 2,
)
@given(ANY, ANY, ANY)
def test_any_names_and_texts(summary, branch, job, text):
    case = Case(job, text, branch, 3, problems=(Problem("failure", text, text * 3),))
    one = task("x" + branch, "x" + job, "failed", reason=text, denied=(text,))
    markdown, html = summary(replace(one, id="a"), failing=[case])
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        assert token.type != "html_block" or token.content in OUR_HTML
        for child in token.children or ():
            assert child.type not in {"link_open", "image"}
            assert child.type != "html_inline" or child.content in OUR_HTML
    check_html(html)


@pytest.mark.parametrize(("text", "span"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("", "` `")])
def test_code_spans(text, span):
    assert summary_markdown.code(text) == span


def test_code_in_a_cell_begins_no_other():
    assert summary_markdown.code("a|b\\|c", cell=True) == "`a¦b\\¦c`"


# Size


def test_a_summary_that_github_takes(summary):
    text = "`x" * 2000
    many = [Case("c", f"n{number}", problems=(Problem("failure", text, text),)) for number in range(60)]
    tasks = [replace(task("b" * number, "j" * 300, "failed", reason=text), id="a") for number in range(1, 25)]
    markdown, html = summary(*tasks, failing=many)
    assert len(markdown.encode()) < 1024 * 1024
    assert "sections left out: see `summary.html`]" in markdown
    assert "40 failed tests left out" in markdown
    check_markdown(markdown)
    assert len(html) < 21 * 1024 * 1024


def test_pages_that_would_be_too_large_are_cut_between_jobs(summary, monkeypatch):
    monkeypatch.setattr(summary_html, "_LIMIT", 5000)
    _, html = summary(*(task("b" * number, verdict="failed", reason="r" * 1000) for number in range(1, 20)))
    assert "jobs left out: see junit.xml]" in html
    check_html(html)
