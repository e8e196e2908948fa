"""References to container images and platforms: what they mean, and which texts are refused."""

from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.images.oci.references import (
    Platform,
    Reference,
    is_reference,
    parse_platform,
    parse_reference,
    platform_of,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4
HERE = Path("/work/project")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docker://registry.example/team/app", Reference("docker", "registry.example/team/app")),
        ("docker://registry.example/team/app:1.2", Reference("docker", "registry.example/team/app", "1.2")),
        ("docker://localhost:5000/a", Reference("docker", "localhost:5000/a")),
        ("docker://[::1]:5000/a:b", Reference("docker", "[::1]:5000/a", "b")),
        ("docker://app", Reference("docker", "app")),
        (f"docker://r.example/a@{DIGEST}", Reference("docker", "r.example/a", digest=DIGEST)),
        (f"docker://r.example/a:1@{DIGEST}", Reference("docker", "r.example/a", "1", DIGEST)),
        ("oci:/images/app", Reference("oci", "/images/app")),
        ("oci:build/app:1.2", Reference("oci", "/work/project/build/app", "1.2")),
        ("oci:a:b/c", Reference("oci", "/work/project/a:b/c")),
        ("oci-archive:app.tar:v1", Reference("oci-archive", "/work/project/app.tar", "v1")),
        ("docker-daemon:app:latest", Reference("docker-daemon", "app", "latest")),
        ("docker-daemon:registry.example/a:1", Reference("docker-daemon", "registry.example/a", "1")),
    ],
)
def test_meaning_of_references(text, expected):
    assert is_reference(text)
    assert parse_reference(text, HERE) == expected
    assert parse_reference(str(expected), HERE) == expected


def test_digest_wins_over_a_tag_for_skopeo():
    assert (
        parse_reference(f"docker://r.example/a:1@{DIGEST}", HERE).source == f"docker://r.example/a@{DIGEST}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "docker://", "docker:///app", "docker://Team/App", "docker://a/b:", "docker://a/b@sha256:1",
        f"docker://a/b@{DIGEST}0", "docker://a b", "docker://a/b\n", "docker://--tls-verify=false", "docker://a//b",
        "oci:", "oci:\0", "oci:a\x1b[2J", "docker-daemon:app", "docker-daemon:", "docker://" + "a" * 5000,
    ],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="invalid image reference") as caught:
        parse_reference(text, HERE)
    assert "docker://registry.example/team/app:1.2" in caught.value.resolution


@pytest.mark.parametrize("text", ["python", "microvm/kits/db", "./oci", "sha256:" + "0" * 64, "dockerfile"])
def test_names_of_kits_are_no_references(text):
    assert not is_reference(text)


def test_platforms():
    assert parse_platform("linux/amd64") == Platform("amd64")
    assert parse_platform("linux/arm64/v8").machine == "aarch64"
    assert str(platform_of("x86_64")) == "linux/amd64"
    for text in ("windows/amd64", "linux/riscv64", "linux", "", "amd64"):
        with pytest.raises(UsageError, match="invalid platform: expected linux/amd64 or linux/arm64"):
            parse_platform(text)
