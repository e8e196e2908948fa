"""Built images on registries are a stranger's data: which artifacts are accepted, and which are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import PullError, UsageError
from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.oci.built import (
    ARTIFACT,
    CONFIGURATION,
    MANIFEST,
    artifact_of,
    check_image,
    descriptor_of,
    is_built,
    parse_artifact,
    parse_image,
)
from pytest_microvm.images.oci.documents import parse_manifest
from pytest_microvm.images.oci.references import Platform, parse_target

ROLES = ("kernel", "initramfs", "runtime", "rootfs")
FILES = {role: str(number) * 64 for number, role in enumerate(ROLES)}
IMAGE = {
    "format": 2,
    "architecture": "x86_64",
    "environment": {"LANG": "C.UTF-8"},
    "files": FILES,
    "resources": {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3},
}
LAYERS = ["a" * 64, "b" * 64]
FULL = {
    **IMAGE,
    "layers": LAYERS,
    "start": {"entrypoint": ["/app"], "arguments": ["-v"], "workdir": "/srv", "user": "7"},
    "services": [{"name": "db", "start": "db &", "ready": "db --ping"}],
}


def artifact(image=IMAGE, **changes):
    """Return an artifact's document."""
    data = canonical_json(image)
    sizes = dict.fromkeys([*image["files"].values(), *image.get("layers", [])], 1000)
    return {**artifact_of(data, sizes), **changes}


def parsed(image=IMAGE, document=None, platform="amd64"):
    """Check an image and its artifact as a pull does."""
    found = parse_artifact(document or artifact(image))
    data = canonical_json(image)
    shown = "docker://registry.example/team/kit"
    return parse_image(data, found, image_format=2, platform=Platform(platform), shown=shown)


@pytest.mark.parametrize("image", [IMAGE, FULL, {**IMAGE, "layers": [FILES["rootfs"]]}])
def test_artifact_is_recognised_and_names_each_file_once(image):
    document = json.loads(json.dumps(artifact(image)))
    assert is_built(document)
    assert parsed(image, document) == image
    found = [file.digest.partition(":")[2] for file in parse_artifact(document).layers]
    assert found == list(dict.fromkeys([*FILES.values(), *image.get("layers", [])]))
    assert document["config"] == descriptor_of(canonical_json(image), CONFIGURATION)


def test_container_images_and_other_artifacts_are_none():
    other = artifact(artifactType="application/vnd.example", config=descriptor_of(b"{}", "application/x"))
    assert not is_built(other)
    assert not is_built({"config": None})
    with pytest.raises(PullError, match="it is no image, but has the kind"):
        parse_manifest(other)


def without(role):
    return [one for one in artifact()["layers"] if role not in one["mediaType"]]


def with_file(**changes):
    first, *others = artifact()["layers"]
    return [{**first, **changes}, *others]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schemaVersion": 1}, "no OCI image manifest"),
        ({"mediaType": "application/vnd.docker.distribution.manifest.v2+json"}, "no OCI image manifest"),
        ({"artifactType": "application/vnd.example"}, "kind and that of its configuration differ"),
        ({"config": descriptor_of(b"{}", "application/vnd.oci.image.config.v1+json")}, "differ"),
        ({"config": None}, "refers to nothing"),
        ({"config": {**descriptor_of(b"", CONFIGURATION), "size": 2 * 1024**2}}, "more than 1 MiB"),
        ({"layers": None}, "expected a list"),
        ({"layers": [{}] * 1000}, "at most"),
        ({"layers": without("kernel")}, f"it lacks the file {FILES['kernel'][:12]}"),
        ({"layers": []}, "it lacks the file"),
        ({"layers": [*artifact()["layers"], artifact()["layers"][0]]}, "has a file twice"),
        ({"layers": with_file(mediaType="application/vnd.pytest-microvm.rootfs.v1")}, "has the kind"),
        ({"layers": with_file(mediaType="application/vnd.oci.image.layer.v1.tar")}, "has the kind"),
        ({"layers": with_file(digest="sha256:../../etc/passwd")}, "expected a SHA-256 digest"),
        ({"layers": with_file(digest="sha512:" + "0" * 128)}, "expected a SHA-256 digest"),
        ({"layers": with_file(size=2**60)}, "expected a size"),
        ({"layers": with_file(size=20 * 1024**3)}, "more than 16 GiB"),
        ({"layers": with_file(size=-1)}, "expected a size"),
        (
            {"layers": [*artifact()["layers"], {**artifact()["layers"][0], "digest": f"sha256:{'e' * 64}"}]},
            f"the file {'e' * 12} is none of the image's",
        ),
    ],
)
def test_invalid_artifact_is_refused(changes, why):
    with pytest.raises(PullError, match="refused") as caught:
        parsed(document=artifact(**changes))
    assert (caught.value.reason, why in str(caught.value)) == ("refused", True), caught.value


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 3}, "another format than 2"),
        ({"architecture": "riscv64"}, "unknown architecture"),
        ({"architecture": ["x86_64"]}, "unknown architecture"),
        ({"network": ["all"]}, "it allows its machines network access"),
        ({"python": "CPython 3.11"}, "unknown key 'python'"),
        ({"\x1b[31mkey": 1}, "unknown key"),
        ({"files": {**FILES, "extra": "f" * 64}}, "expected kernel, initramfs, runtime, rootfs"),
        ({"files": {"kernel": "0" * 64}}, "expected kernel, initramfs, runtime, rootfs"),
        ({"files": list(FILES.values())}, "expected kernel, initramfs, runtime, rootfs"),
        ({"files": {**FILES, "kernel": "../../../etc/passwd"}}, "expected a SHA-256 digest"),
        ({"files": {**FILES, "kernel": 7}}, "expected a SHA-256 digest"),
        ({"layers": ["0" * 63 + "\n"]}, "expected a SHA-256 digest"),
        ({"layers": ["a" * 64] * 200}, "at most"),
        ({"layers": "a" * 64}, "expected a list"),
        ({"environment": ["A=b"]}, "environment: expected"),
        ({"environment": {"A\x00B": "x"}}, "environment: expected text"),
        ({"environment": {"A=B": "x"}}, "invalid variable"),
        ({"environment": {"": "x"}}, "invalid variable"),
        ({"environment": {"A": None}}, "invalid variable"),
        ({"environment": {"A": "\x00"}}, "environment: expected text"),
        ({"environment": {"A": "\ud800"}}, "environment: expected text"),
        ({"environment": {f"A{number}": "" for number in range(2000)}}, "at most 1000 variables"),
        ({"resources": {"cpus": 1}}, "at least cpus, memory and disk"),
        ({"resources": {**IMAGE["resources"], "memory": "512M"}}, "expected numbers"),
        ({"resources": {**IMAGE["resources"], "memory": 1}}, "invalid size: expected at least"),
        ({"resources": {**IMAGE["resources"], "memory": 2**70}}, "a number is impossible"),
        ({"resources": {**IMAGE["resources"], "cpus": float("nan")}}, "manifest: resources.cpus"),
        ({"resources": {**IMAGE["resources"], "cpus": 10**6}}, "manifest: resources.cpus"),
        ({"resources": {**IMAGE["resources"], "\x1b[2J": 1}}, "unknown key"),
        ({"resources": []}, "invalid resources"),
        ({"start": {"entrypoint": "sh -c x"}}, "entrypoint: expected a list"),
        ({"start": {"arguments": ["\x00"]}}, "arguments: expected text"),
        ({"start": {"workdir": "../.."}}, "expected an absolute path"),
        ({"start": {"user": 0}}, "user: expected text"),
        ({"start": {"privileged": True}}, "start: expected"),
        ({"services": [{"name": "../x", "start": "a", "ready": "b"}]}, "services: invalid name"),
        ({"services": [{"name": "x", "start": "a"}]}, "services: expected name, start and ready"),
        ({"services": {"x": "y"}}, "services: expected a list"),
    ],
)
def test_invalid_image_is_refused(changes, why):
    image = {**IMAGE, **changes}
    with pytest.raises(PullError) as caught:
        parsed(image, artifact())
    assert (caught.value.reason, why in str(caught.value)) == ("refused", True), caught.value
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        json.dumps(IMAGE).encode(),
        canonical_json(IMAGE) + b"\n",
        canonical_json({key: value for key, value in IMAGE.items() if key != "files"}),
        canonical_json({**IMAGE, "start": {}})[:-1],
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_manifest_in_another_form_is_refused(data):
    with pytest.raises(PullError) as caught:
        check_image(data)
    assert caught.value.reason == "refused"


def test_image_of_another_architecture_is_absent():
    with pytest.raises(PullError, match="has no image for linux/arm64") as caught:
        parsed(platform="arm64")
    assert (caught.value.reason, caught.value.details) == ("absent", "it is for linux/amd64")


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("registry.example/team/kit:1.2", "registry.example/team/kit", "1.2"),
        ("docker://127.0.0.1:5000/kit", "127.0.0.1:5000/kit", ""),
        ("localhost/kit", "localhost/kit", ""),
        ("[::1]:5000/kit:x", "[::1]:5000/kit", "x"),
    ],
)
def test_name_of_a_pushed_image(text, name, tag):
    found = parse_target(text)
    assert (found.transport, found.name, found.tag, found.digest) == ("docker", name, tag, "")


@pytest.mark.parametrize(
    "text",
    ["kit", "team/kit:1", "", "oci:folder", f"registry.example/kit@sha256:{'0' * 64}", "--help",
     "registry.example/", "registry.example/kit:../x", "registry.example/Kit", "registry.example/kit\n",
     "registry.example/" + "a" * 5000],
)  # fmt: skip
def test_name_without_a_registry_is_refused(text):
    """A name without one would go to a public registry."""
    with pytest.raises(UsageError, match="invalid name of a pushed image"):
        parse_target(text)


def test_kinds_of_files_are_told_apart():
    kinds = [
        one["mediaType"].removeprefix("application/vnd.pytest-microvm.") for one in artifact(FULL)["layers"]
    ]
    assert kinds == [f"{role}.v1" for role in (*ROLES, "layer", "layer")]
    assert (artifact()["artifactType"], artifact()["mediaType"]) == (ARTIFACT, MANIFEST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def outcome(check):
    """Return the error of a check, or its result."""
    try:
        return None, check()
    except PullError as error:
        return error, None


@given(st.sampled_from([*FULL, "network", "x"]), JSON)
def test_any_value_of_a_manifest_is_accepted_or_refused(key, value):
    image = {**FULL, key: value}
    error, found = outcome(lambda: parsed(image, artifact(FULL)))
    assert "\x1b" not in str(error)
    assert error or canonical_json(found) == canonical_json(image)


@given(st.sampled_from(["schemaVersion", "mediaType", "artifactType", "config", "layers", "x"]), JSON)
def test_any_value_of_an_artifact_is_accepted_or_refused(key, value):
    error, _found = outcome(lambda: parsed(document={**artifact(), key: value}))
    assert error.reason == "refused" if error else key in ("x", "mediaType", "schemaVersion")
