"""A suite with PostgreSQL: 60 tests in one process, each setting it up, and each in a fork in which it runs.

The first is what a native run would take on a computer as fast as the machine: one machine runs all tests.
Setting it up for all would take half an hour, so a few tests do that, and all are worked out from these.
Under emulation every fork translates PostgreSQL's code anew, which one machine does once: hence 2.6, not 1.5.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import promise

TESTS = 60
REPEATED = 4

KIT = """
description = "python with PostgreSQL, for a benchmark"
parent = "python"
packages = ["postgresql", "python3-psycopg2"]
[resources]
memory = "768M"
disk = "2G"
"""

CONFTEST = """
import subprocess
import psycopg2
import pytest

PROGRAMS = next(__import__("pathlib").Path("/usr/lib/postgresql").iterdir()) / "bin"


def pytest_addoption(parser):
    parser.addoption("--drop", action="store_true")
    parser.addoption("--tests", type=int, default=60)


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--tests")))


def as_postgres(program, *arguments):
    subprocess.run(["runuser", "-u", "postgres", "--", PROGRAMS / program, *arguments], check=True, cwd="/")


@pytest.fixture(scope="session")
def database():
    folder = "/tmp/cluster"
    as_postgres("initdb", "-D", folder, "--auth=trust", "--no-sync")
    as_postgres("pg_ctl", "-D", folder, "-w", "-t", "600", "-l", "/tmp/log", "-o", "-F -k /tmp", "start")
    connection = psycopg2.connect(host="/tmp", user="postgres", dbname="postgres")
    with connection, connection.cursor() as cursor:
        for number in range(40):
            cursor.execute(f"create table t{number} (id serial primary key, word text not null unique)")
            cursor.execute(f"insert into t{number} (word) select 'w' || n from generate_series(1, 50) n")
    yield connection
    connection.close()
    as_postgres("pg_ctl", "-D", folder, "-m", "immediate", "stop")
"""

TEST = """
def test_drops_everything(database, number, request):
    cursor = database.cursor()
    cursor.execute("select count(*) from pg_tables where schemaname = 'public'")
    assert cursor.fetchone() == (40,)
    for table in range(40):
        cursor.execute(f"drop table t{table}")
    database.commit() if request.config.getoption("--drop") else database.rollback()
"""


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kit = folder / "microvm" / "kits" / "postgres" / "kit.toml"
        kit.parent.mkdir(parents=True)
        kit.write_text(KIT)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "test_shop.py").write_text(TEST)
        _run(folder, "--tests=1", "--microvm-isolation=session")  # the image and the templates
        _run(folder, "--tests=1", "--drop")
        one = _run(folder, f"--tests={TESTS}", "--microvm-isolation=session")
        repeated = _run(
            folder, f"--tests={REPEATED}", "--drop", "--microvm-fixtures=repeat", "--microvm-pool=0"
        )
        forked = _run(folder, f"--tests={TESTS}", "--drop", "--microvm-fixtures=fork")
    each = repeated / REPEATED
    print(f"one machine, {TESTS} tests        {one:.1f} s")
    print(f"set up in each machine      {each:.1f} s for each test ({REPEATED} tests)")
    print(f"forked, {TESTS} tests, dropping   {forked:.1f} s")
    return [
        promise("forked to set up in one machine", forked / one, 2.6, " x"),
        promise("set up in each machine to forked", each * TESTS / forked, 10.0, " x", at_least=True),
    ]


def _run(folder: Path, *options: str) -> float:
    command = [sys.executable, "-m", "pytest", "-q", "--microvm", "--microvm-image=postgres", *options]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-1000:])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
