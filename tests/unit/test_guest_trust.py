"""Certificates that a machine is given: at the end of its own, in place of those it was given before."""

import pytest

from pytest_microvm.guest import resume


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    file = tmp_path / "certs" / "ca-certificates.crt"
    monkeypatch.setattr(resume, "_TRUST", str(file))
    monkeypatch.setattr(resume, "_ADDED", str(tmp_path / "added"))
    return file


def test_they_follow_the_images_own(bundle):
    bundle.parent.mkdir()
    bundle.write_text("image\n")
    resume._trust({"trust": "first, which is longer\n"})
    assert bundle.read_text() == "image\nfirst, which is longer\n"
    resume._trust({"trust": "second\n"})
    assert bundle.read_text() == "image\nsecond\n"
    resume._trust({"trust": ""})
    assert bundle.read_text() == "image\n"
    resume._trust({"trust": "third\n"})
    assert bundle.read_text() == "image\nthird\n"


def test_what_a_program_has_written_since_stays(bundle):
    bundle.parent.mkdir()
    bundle.write_text("image\n")
    resume._trust({"trust": "first\n"})
    bundle.write_text("image\nof update-ca-certificates\n")
    resume._trust({"trust": "second\n"})
    assert bundle.read_text() == "image\nof update-ca-certificates\nsecond\n"


def test_an_image_without_any(bundle):
    resume.make_ready()
    assert not bundle.exists()
    resume._trust({"trust": "only\n"})
    assert bundle.read_text() == "only\n"
