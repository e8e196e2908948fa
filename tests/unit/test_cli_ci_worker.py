"""`ci worker`: its options, what it refuses, and the units in ci/cluster that start it."""

from __future__ import annotations

import argparse
import configparser
import shlex
from pathlib import Path

import pytest

from pytest_microvm.cli import _parser, ci_worker, main
from pytest_microvm.errors import UsageError

CLUSTER = Path(__file__).resolve().parents[2] / "ci/cluster"


def test_an_address_of_another_computer_needs_tls(capsys):
    assert main(["ci", "worker", "tcp://ci.example:8786"]) == 4
    assert "without encryption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--slots", "0"], "invalid --slots: expected 1 or more jobs, got 0"),
        (
            ["--memory", "much"],
            "--memory: invalid size: expected bytes, or a number with K, M, G or T, got 'much'",
        ),
        (["--vcpus", "-1"], "--vcpus"),
        (["--tls-ca", "ca.pem"], "belong together"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, words, why):
    arguments = [f"{words[0]}={words[1]}"]
    assert main(["ci", "worker", "tcp://127.0.0.1:1", *arguments]) == 4
    assert why in capsys.readouterr().err


def test_certificates_are_three_files_or_none():
    parser = argparse.ArgumentParser()
    ci_worker.add_certificate_options(parser)
    assert ci_worker.certificates(parser.parse_args([])) is None
    words = ["--tls-ca", "a", "--tls-cert", "b", "--tls-key", "c"]
    found = ci_worker.certificates(parser.parse_args(words))
    assert (found.ca, found.cert, found.key) == (Path("a"), Path("b"), Path("c"))
    with pytest.raises(UsageError, match="belong together"):
        ci_worker.certificates(parser.parse_args(words[:4]))


def unit(name):
    """Return a unit of systemd; a line that ends with a backslash goes on."""
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(text)
    return parser


def test_the_workers_unit_starts_what_there_is():
    program, *words = shlex.split(unit("pytest-microvm-worker.service")["Service"]["ExecStart"])
    assert program.endswith("/pytest-microvm")
    arguments = _parser().parse_args(words)
    assert arguments.scheduler.startswith("tls://")
    assert arguments.tls_key == Path("/etc/pytest-microvm/host.key")


def test_the_schedulers_unit_starts_what_there_is():
    from distributed.cli.dask_scheduler import main as scheduler  # noqa: PLC0415

    program, verb, *words = shlex.split(unit("pytest-microvm-scheduler.service")["Service"]["ExecStart"])
    assert (program.rpartition("/")[2], verb) == ("dask", "scheduler")
    known = {name for parameter in scheduler.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
