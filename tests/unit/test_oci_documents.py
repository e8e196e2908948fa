"""Index, manifest and configuration of container images are a stranger's data."""

import json

import pytest

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci.documents import (
    MAX_DOCUMENT,
    MAX_LAYERS,
    Descriptor,
    choose,
    is_index,
    parse_configuration,
    parse_document,
    parse_index,
    parse_manifest,
)
from pytest_microvm.images.oci.references import Platform

DIGEST = "sha256:" + "a" * 64
CONFIGURATION = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def descriptor(**changes):
    return {"mediaType": LAYER, "digest": DIGEST, "size": 10, **changes}


def manifest(**changes):
    configuration = descriptor(mediaType=CONFIGURATION)
    return {"schemaVersion": 2, "config": configuration, "layers": [descriptor()], **changes}


def configuration(**changes):
    roots = {"type": "layers", "diff_ids": [DIGEST]}
    return {"os": "linux", "architecture": "amd64", "rootfs": roots, **changes}


def with_config(**config):
    return configuration(config=config)


def test_manifest_names_configuration_and_layers():
    found = parse_manifest(manifest())
    assert found.configuration == Descriptor(DIGEST, 10, CONFIGURATION)
    assert found.layers == (Descriptor(DIGEST, 10, LAYER),)
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    assert parse_manifest(manifest(layers=[descriptor(mediaType=docker)])).layers[0].media_type == docker


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (manifest(schemaVersion=1), "older than 2017"),
        (manifest(mediaType="application/vnd.oci.image.index.v1+json"), "of the kind"),
        (manifest(config=descriptor(mediaType="application/vnd.cncf.helm.config.v1+json")), "it is no image"),
        (manifest(config=None), "refers to nothing"),
        (
            manifest(config=descriptor(mediaType=CONFIGURATION, size=MAX_DOCUMENT + 1)),
            "configuration has more",
        ),
        (manifest(layers="all"), "layers: expected a list"),
        (manifest(layers=[descriptor()] * (MAX_LAYERS + 1)), "at most 127 are possible, it has 128"),
        (manifest(layers=[descriptor(digest="sha256:../../etc/passwd")]), "expected a SHA-256 digest"),
        (manifest(layers=[descriptor(digest="sha512:" + "a" * 128)]), "expected a SHA-256 digest"),
        (manifest(layers=[descriptor(size=-1)]), "expected a size"),
        (manifest(layers=[descriptor(size=True)]), "expected a size"),
        (manifest(layers=[descriptor(size=2**80)]), "expected a size"),
        (
            manifest(layers=[descriptor(mediaType="application/vnd.oci.image.layer.v1.tar+encrypted")]),
            "a layer has",
        ),
        (manifest(layers=[descriptor(mediaType=7)]), "expected a media type"),
    ],
)
def test_manifest_is_refused(document, why):
    with pytest.raises(PullError, match=why) as caught:
        parse_manifest(document)
    assert caught.value.reason == "refused"


def test_configuration_has_the_command():
    found = parse_configuration(
        with_config(
            Env=["PATH=/bin", "EMPTY=", "A=b=c"],
            Entrypoint=["/app"],
            Cmd=["-v"],
            WorkingDir="srv",
            User="7:8",
        ),
        1,
    )
    assert found.environment == (("A", "b=c"), ("EMPTY", ""), ("PATH", "/bin"))
    assert (found.entrypoint, found.arguments) == (("/app",), ("-v",))
    assert (found.workdir, found.user, found.platform) == ("/srv", "7:8", "linux/amd64")
    plain = parse_configuration(with_config(Env=None, Entrypoint=None, Cmd=None), 1)
    assert (plain.environment, plain.entrypoint, plain.workdir) == ((), (), "")
    assert parse_configuration(configuration(), 1).user == ""


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (configuration(rootfs=None), "it has no layers"),
        (
            configuration(rootfs={"type": "layers", "diff_ids": [DIGEST, DIGEST]}),
            "it has 2 layers, and the manifest",
        ),
        (configuration(rootfs={"type": "layers", "diff_ids": ["x"]}), "something else than SHA-256"),
        (configuration(config=[]), None),
        (configuration(config=["x"]), "config is no object"),
        (with_config(Env=["PATH"]), "expected NAME=VALUE"),
        (with_config(Env=["=x"]), "expected NAME=VALUE"),
        (with_config(Env=["A=\0"]), "Env: expected text"),
        (with_config(Env=["A=\ud800"]), "Env: expected text"),
        (with_config(Env=[f"A{n}=" for n in range(2000)]), "at most 1000"),
        (with_config(Env=["A=" + "x" * 200_000]), "Env: expected text"),
        (with_config(Entrypoint="/app"), "Entrypoint: expected a list"),
        (with_config(Cmd=[7]), "Cmd: expected text"),
        (with_config(User=0), "User: expected text"),
    ],
)
def test_configuration_is_refused(document, why):
    if why is None:
        assert (
            parse_configuration(document, 1).arguments == ()
        )  # PHP writes an empty list for an empty object
        return
    with pytest.raises(PullError, match=why):
        parse_configuration(document, 1)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"nonsense", b"[" * 100_000, b"\xff", b" " * (MAX_DOCUMENT + 1)]
)
def test_documents_are_bounded_json_objects(data):
    with pytest.raises(PullError, match="the index of the image is refused"):
        parse_document(data, "the index")


def entry(platform=None, name="", **changes):
    notes = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
    return descriptor(**({"platform": platform} if platform else {}), **notes, **changes)


def test_image_of_the_platform_is_chosen():
    amd, arm = (
        {"os": "linux", "architecture": "amd64"},
        {"os": "linux", "architecture": "arm64", "variant": "v8"},
    )
    unknown = {"os": "unknown", "architecture": "unknown"}  # what buildx writes for attestations
    entries = parse_index({"manifests": [entry(amd, size=1), entry(arm, size=2), entry(unknown)]})
    assert choose(entries, Platform("amd64"), "it").size == 1
    assert choose(entries, Platform("arm64"), "it").size == 2
    with pytest.raises(PullError, match="it has no image for linux/amd64") as caught:
        choose(entries[1:], Platform("amd64"), "it")
    assert (caught.value.reason, caught.value.details) == ("absent", "it is for linux/arm64")


def test_only_entry_without_a_platform_is_chosen():
    (only,) = parse_index({"manifests": [entry()]})
    assert choose([only], Platform("amd64"), "it") == only
    with pytest.raises(PullError, match="has no image"):
        choose([only, only], Platform("amd64"), "it")


@pytest.mark.parametrize("entries", [None, {}, [7], [{"digest": DIGEST}], [entry()] * 2000])
def test_index_is_refused(entries):
    with pytest.raises(PullError, match="the index of the image is refused"):
        parse_index({"manifests": entries})


def test_index_is_recognised_without_its_kind():
    assert is_index({"manifests": []})
    assert is_index({"mediaType": "application/vnd.docker.distribution.manifest.list.v2+json"})
    assert not is_index(json.loads(json.dumps(manifest())))


def test_errors_show_no_control_characters():
    with pytest.raises(PullError) as caught:
        parse_manifest(manifest(mediaType="\x1b]0;x\x07::set-output"))
    assert "\x1b" not in str(caught.value)
