"""tox's own output under ``--microvm``, with real tox: a project's words command nothing."""

import io
import subprocess
import sys

import pytest

from pytest_microvm.tox.shown import SafeStream

NASTY = r"\u001b]0;owned\u0007\n::error::owned\n##vso[x]"
BEGIN = "no_package = true\n[env_run_base]\n"


def run_tox(folder, text, *words):
    (folder / "tox.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tox", *words, "--microvm"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert "\x1b]" not in done.stdout
    assert "\n::" not in done.stdout
    assert "##vso[" not in done.stdout
    return done


def test_safe_stream_makes_text_safe_and_leaves_bytes():
    plain = io.TextIOWrapper(io.BytesIO(), write_through=True)
    print("\x1b[31mred\x1b[0m \x1b]0;x\x07", "::error::x", sep="\n", file=SafeStream(plain))
    SafeStream(plain).buffer.write(b"\x1b]")
    assert plain.buffer.getvalue() == b"\x1b[31mred\x1b[0m \\x1b]0;x\\x07\n:\\:error::x\n\x1b]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{BEGIN}platform = "{NASTY}"\n', ["run"]),
        (f'{BEGIN}description = "{NASTY}"\n', ["list"]),
        (f'{BEGIN}platform = "x"\n"{NASTY}" = 1\n', ["run", "-v"]),
    ],
    ids=["log", "list", "key"],
)
def test_words_of_a_configuration_command_nothing(tmp_path, text, words):
    assert "owned" in run_tox(tmp_path, text, *words).stdout


@pytest.mark.parametrize("name", [r"\u001b]0;x\u0007", "::error::x", ":", "##vso[x]"])
def test_environment_name_that_commands_is_refused(tmp_path, name):
    done = run_tox(tmp_path, f'env_list = ["{name}"]\n{BEGIN}', "run")
    assert "invalid environment name" in done.stdout
    assert done.returncode != 0


def test_errors_of_the_whole_run_are_safe_too(tmp_path):
    done = run_tox(tmp_path, f'work_dir = "/none/{NASTY}"\n{BEGIN}', "run")
    assert "which is not in the project" in done.stdout
