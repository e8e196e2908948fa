"""What a command becomes on its way to the agent."""

from pathlib import PurePosixPath

import pytest

from pytest_microvm.agent.process import command_arguments
from pytest_microvm.errors import UsageError


def test_a_list_is_no_shell_command():
    assert command_arguments(["ls", PurePosixPath("/srv/a b")], {"A": "1"}, None, None) == {
        "argv": ["ls", "/srv/a b"], "cwd": "/", "env": {"A": "1"},
    }  # fmt: skip


def test_a_string_is_for_the_shell():
    assert command_arguments("a | b", {}, PurePosixPath("/srv"), "nobody") == {
        "shell": "a | b", "cwd": "/srv", "env": {}, "user": "nobody",
    }  # fmt: skip


def test_root_may_be_named_by_number():
    assert command_arguments(["id"], {}, None, 0)["user"] == 0


@pytest.mark.parametrize("args", [[], "", [""], ["", "x"]])
def test_an_empty_command(args):
    with pytest.raises(UsageError, match="an empty command"):
        command_arguments(args, {}, None, None)


@pytest.mark.parametrize("args", ["a\0b", ["a", "b\0"]])
def test_a_nul_character(args):
    with pytest.raises(UsageError, match="NUL"):
        command_arguments(args, {}, None, None)
