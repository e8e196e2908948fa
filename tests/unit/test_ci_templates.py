"""The templates for other CI systems as files."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

CI = Path(__file__).resolve().parents[2] / "ci"
PROGRAMS = Path(sys.executable).parent


def run(*command, **more):
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more
    )


def check_shell(script):
    done = run(PROGRAMS / "shellcheck", "--shell=sh", "-", input=script)
    assert done.returncode == 0, done.stdout


def test_buildkite():
    path = CI / "buildkite" / "pipeline.yml"
    done = run(PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.buildkite", path)
    assert done.returncode == 0, done.stdout
    [script] = re.findall(r"command: \|\n((?: {6}.*\n)+)", path.read_text())
    check_shell(textwrap.dedent(script))


def test_jenkins():
    text = (CI / "jenkins" / "Jenkinsfile").read_text()
    [script] = re.findall(r"script: '''\n(.*?)'''", text, re.DOTALL)
    check_shell(textwrap.dedent(script))
    # Groovy puts nothing of its own into a string of three single quotes, but knows escapes there.
    assert "\\" not in script
    code = re.sub(r"(?s:'''.*?''')|'[^'\n]*'|\"[^\"\n]*\"|//.*", "", text)
    for opening, closing in ("{}", "()"):
        assert code.count(opening) == code.count(closing)
