"""Which arguments go where: by value, without pytest."""

import argparse

import pytest

from pytest_microvm.suite.arguments import Split, Token, option_arity, split_arguments, tokens

ARITY = {
    **dict.fromkeys(
        ["-v", "--verbose", "-q", "-x", "-s", "-l", "--lf", "--co", "--pdb", "--microvm", "-h"], "0"
    ),
    **dict.fromkeys(["-k", "-m", "-p", "-o", "-W", "-c", "-r", "-n", "--tb", "--maxfail", "--ignore"], "1"),
    **dict.fromkeys(["--rootdir", "--junitxml", "--capture", "--microvm-args", "--microvm-image"], "1"),
    "--cache-show": "?",
}


def words(text):
    return tuple(text.split())


@pytest.mark.parametrize(
    ("given", "host", "guest"),
    [
        ("", "", ""),
        ("tests/a.py::test", "tests/a.py::test", "tests/a.py::test"),
        ("-k word -m mark a.py", "-k word -m mark a.py", "a.py"),
        ("-kword -mmark a.py", "-kword -mmark a.py", "a.py"),
        ("-xvs a.py", "-x -v -s a.py", "a.py"),
        ("-xl a.py", "-x -l a.py", "-l a.py"),
        ("--tb=short --tb long", "--tb=short --tb long", "--tb=short --tb long"),
        ("--maxfail=2 --maxfail 3", "--maxfail=2 --maxfail 3", ""),
        ("-n2 -n 4 --junitxml=x.xml", "-n2 -n 4 --junitxml=x.xml", ""),
        ("-W error -Wignore", "", "-W error -Wignore"),
        ("--own=1 --flag -Z", "", "--own=1 --flag -Z"),
        ("--own value a.py", "value a.py", "--own value a.py"),
        ("-xZ", "", "-xZ"),
        ("-o key=value -okey=value", "-o key=value -okey=value", "-o key=value -okey=value"),
        ("-p no:doctest -pplugin", "-p no:doctest -pplugin", "-p no:doctest -pplugin"),
        ("-p only_here", "-p only_here", ""),
        (
            "--microvm --microvm-image=x --microvm-args -x",
            "--microvm --microvm-image=x --microvm-args -x",
            "",
        ),
        ("--cache-show a* -v", "--cache-show a* -v", ""),
        ("--cache-show -v", "--cache-show -v", ""),
        ("-- -x a.py", "-- -x a.py", "-- -x a.py"),
        ("-k", "-k", ""),
        ("--capture=no -rA", "--capture=no -rA", ""),
        ("-", "-", "-"),
        ("--ignore=a --rootdir=b -c c", "--ignore=a --rootdir=b -c c", "--ignore=a --rootdir=b -c c"),
    ],
)
def test_split(given, host, guest):
    split = split_arguments(words(given), ARITY, lambda name: name == "only_here")
    assert (split.host, split.guest) == (words(host), words(guest))


def test_a_value_that_looks_like_an_option_stays_one():
    assert split_arguments(["-k", "--own", "-m", "-x"], ARITY).guest == ()


def test_what_shows_the_project_goes_to_the_machine_alone():
    assert split_arguments(["--fixtures", "-v"], {**ARITY, "--fixtures": "0"}) == Split(
        ("-v",), ("--fixtures",)
    )


def test_tokens_carry_option_and_value():
    assert list(tokens(["--tb=short", "-kx", "a.py", "--own=1"], ARITY)) == [
        Token(("--tb=short",), "--tb", "short"),
        Token(("-kx",), "-k", "x"),
        Token(("a.py",)),
        Token(("--own=1",), "--own", "1", known=False),
    ]


def test_arity_of_a_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("-c", "--count", action="count")
    parser.add_argument("--one")
    parser.add_argument("--maybe", nargs="?")
    assert option_arity(parser) == {"--flag": "0", "-c": "0", "--count": "0", "--one": "1", "--maybe": "?"}


def test_nothing_is_lost():
    """Every word of the command line goes to at least one side, in its order."""
    given = words("-xvs --own=1 -k a b.py -W error --tb=no -Z --cache-show x c.py -n 2 -p no:x")
    split = split_arguments(given, ARITY)
    rejoined = {*split.host, *split.guest}
    assert [word for word in given if word not in rejoined] == ["-xvs"]
    assert {"-x", "-v", "-s"} <= rejoined
