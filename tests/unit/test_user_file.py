"""The user's own config.toml names plug-ins for the launcher."""

from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.suite.user_file import NAME, UserFile, read_user_file


def test_missing_file_means_no_plugins(tmp_path):
    assert read_user_file(tmp_path / "nowhere") == UserFile()


def test_plugins_and_their_folders_are_read(tmp_path):
    (tmp_path / NAME).write_text('[test]\nplugins = ["html"]\nplugin_path = ["/opt/mine", "~/mine"]\n')
    read = read_user_file(tmp_path)
    assert read == UserFile(("html",), (Path("/opt/mine"), Path.home() / "mine"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[test", "config.toml"),
        ("[tset]\n", "tset"),
        ("test = 1\n", "test"),
        ("[test]\nplugin = []\n", "plugin is not known there"),
        ('[test]\nplugins = "html"\n', "plugins"),
        ('[test]\nplugin_path = ["mine"]\n', "invalid plugin_path: expected absolute paths, got mine"),
    ],
)
def test_unusable_file_is_a_usage_error(tmp_path, text, said):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_user_file(tmp_path)
    assert said in str(caught.value)
