"""Hostile projects through `pytest-microvm run` and `python` in real machines; controls run unprotected."""

import shutil
import subprocess

import pytest

from support import guards
from support.attacks import Listener
from support.commands import MICROVM
from support.run_attacks import Index, RunAttack, attacks_where, names_where, obeyed

TOGETHER = """\
for attack do
    cd "/w/$attack" && sh ./attack.sh </dev/null
    echo
done
echo READY
read -r _
"""


@pytest.fixture(scope="module")
def index():
    with Index() as server:
        yield server


@pytest.fixture
def listener():
    with Listener() as server:
        yield server
        server.shutdown()


@pytest.fixture
def attack(request, tmp_path, listener, index):
    made = RunAttack(request.param, tmp_path, listener, index)
    needed = made.run.get("needs")
    if needed and shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    return made


def problems(attack, said, text=""):
    """Return what an attack did to this computer, and to a terminal that shows ``text``, but should not."""
    done = attack.sprung(attack.listener) + obeyed(text)
    if attack.run["outcome"] == "sprung":
        return [] if done else ["it did not spring: tell SECURITY.md"]
    expected = attack.filled(attack.run.get("said", ""))
    return done if expected in said else [*done, f"not said: {expected}"]


@pytest.mark.parametrize("attack", attacks_where(lambda run: "words" in run), indirect=True)
def test_in_the_folder(attack):
    status, text = attack.command([attack.filled(word) for word in attack.run["words"]])
    attack.shell("after")
    assert status == (4 if attack.run["outcome"] == "refused" else 0), text
    assert problems(attack, text, text) == []
    assert "Traceback (most" not in text


@pytest.mark.parametrize("repeats", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_in_one_machine(tmp_path, listener, index, repeats):
    """Each has a mount of its own there; some of them leave what cannot come back."""
    names = names_where(lambda run: "mount" in run, repeats=repeats)
    attacks = {name: RunAttack(name, tmp_path, listener, index) for name in names}
    mounts = [f"--mount={attack.path}:/w/{name}:{attack.run['mount']}" for name, attack in attacks.items()]
    record = tmp_path / "record"
    words = ["--image", "agent", "--record", record, *mounts, "--", "sh", "-c", TOGETHER, "sh", *names]
    with subprocess.Popen(
        [*MICROVM, "run", *words], cwd=tmp_path, env=attacks[names[0]].environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        shown = b""
        while not shown.endswith(b"READY\n") and (line := process.stdout.readline()):
            shown += line
        for attack in attacks.values():
            attack.shell("meanwhile")
        shown += process.communicate(b"\n", timeout=guards.MACHINE)[0]
    text = shown.decode(errors="surrogateescape")
    kept = "".join(path.read_text(errors="surrogateescape") for path in record.iterdir())
    for attack in attacks.values():
        attack.shell("after")
    done = {name: found for name, attack in attacks.items() if (found := problems(attack, text + kept))}
    assert done == {}, text
    assert obeyed(text) + obeyed(kept) == []
    assert "Traceback (most" not in text
    assert process.returncode == 125, text


def has_control(run):
    return bool(run.get("control", "mount" in run))


@pytest.mark.thorough  # what the attacks do does not change with this package
@pytest.mark.parametrize("attack", attacks_where(has_control), indirect=True)
def test_unprotected(attack):
    text = attack.unprotected()
    assert attack.sprung(attack.listener) + obeyed(text) != [], text
