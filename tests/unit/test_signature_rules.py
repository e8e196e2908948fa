"""``[signatures]`` of the user's config.toml: which images a rule is about, and what is refused in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.images.oci.references import parse_reference, repository_of
from pytest_microvm.images.oci.signature_rules import FILE, read_rules
from pytest_microvm.images.oci.signatures import _entries, _is_for, _parts, _wrong, read_key
from pytest_microvm.suite.user_file import UserFile, read_user_file
from support import guards
from support.signatures import PAYLOAD, SIGNATURE, Signer

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def rules(folder, text):
    (folder / FILE).write_text(f"[signatures]\n{text}\n")
    return read_rules(folder / FILE)


def required(found, reference):
    keys = found.required(parse_reference(reference, Path("/")))
    return None if keys is None else [key.path.parent.name for key in keys]


@pytest.fixture
def keys(tmp_path):
    return {name: Signer(tmp_path / name).public for name in ("one", "two", "three")}


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("registry.example", "docker://registry.example/app"),
        ("registry.example/team", "docker://registry.example/team/app:1"),
        ("registry.example/team/app", "docker://registry.example/team/app"),
        ("registry.example", "docker://REGISTRY.example/app"),
        ("Registry.Example", "docker://registry.example/app"),
        ("registry.example", "docker://registry.example:443/app"),
        ("registry.example:443", "docker://registry.example/app"),
        ("localhost", "docker://localhost/app"),
        ("[::1]:5000", "docker://[::1]:5000/app"),
        ("registry.example/library/app", "docker://registry.example/app"),
        ("registry.example/library", "docker://registry.example/app:1"),
        ("registry.example/app", "docker://registry.example/library/app"),
        ("*", "docker://anywhere.example/app"),
        ("*", "docker://team/app"),
    ],
)
def test_rule_is_about_an_image(tmp_path, keys, rule, reference):
    found = rules(tmp_path, f'"{rule}" = ["{keys["one"]}"]')
    assert required(found, reference) == ["one"]


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("registry.example/team", "docker://registry.example/teams/app"),
        ("registry.example/team", "docker://registry.example/other"),
        ("registry.example", "docker://registry.example.evil.example/app"),
        ("registry.example", "docker://registry.example:5000/app"),
        ("registry.example/library", "docker://registry.example/team/app"),
        ("*", "oci:/some/folder"),
    ],
)
def test_rule_is_not_about_an_image(tmp_path, keys, rule, reference):
    found = rules(tmp_path, f'"{rule}" = ["{keys["one"]}"]')
    assert required(found, reference) is None


def test_name_without_a_registry_is_refused_by_rules_about_registries(tmp_path, keys):
    """skopeo would choose the registry, which may be the one of the rule."""
    found = rules(tmp_path, f'"registry.example" = ["{keys["one"]}"]')
    with pytest.raises(UsageError, match="names no registry") as caught:
        required(found, "docker://team/app:1")
    assert "docker://REGISTRY/team/app" in caught.value.resolution
    assert required(rules(tmp_path, ""), "docker://team/app:1") is None


def test_longest_rule_counts(tmp_path, keys):
    lines = [
        f'"*" = ["{keys["one"]}"]',
        f'"registry.example" = ["{keys["two"]}"]',
        f'"registry.example/team" = ["{keys["three"]}", "one/key.pub"]',
    ]
    found = rules(tmp_path, "\n".join(lines))
    assert required(found, "docker://registry.example/team/app") == ["three", "one"]  # relative to the file
    assert required(found, "docker://registry.example/other") == ["two"]
    assert required(found, "docker://elsewhere.example/app") == ["one"]


def test_rule_without_keys_accepts_nothing(tmp_path):
    assert required(rules(tmp_path, '"*" = []'), "docker://registry.example/app") == []


def test_no_file_and_no_table_are_no_rules(tmp_path):
    reference = parse_reference("docker://registry.example/app", tmp_path)
    assert read_rules(tmp_path / FILE).required(reference) is None
    (tmp_path / FILE).write_text('[test]\nplugins = ["html"]\n')
    assert read_rules(tmp_path / FILE).required(reference) is None


def test_launcher_accepts_the_table(tmp_path):
    (tmp_path / FILE).write_text('[signatures]\n"*" = []\n')
    assert read_user_file(tmp_path) == UserFile()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("signatures = 1", "invalid signatures: expected a table, got 1"),
        ("[signatures]\n'registry.example' = 'key.pub'", "expected a list of files, got 'key.pub'"),
        ("[signatures]\n'registry.example' = [1]", "expected a list of files"),
        ("[signatures]\n'team/app' = []", "expected names that begin with a registry"),
        ("[signatures]\n'registry.example/app:1.2' = []", "expected names that begin with a registry"),
        ("[signatures]\n'docker://registry.example' = []", "expected names that begin with a registry"),
        ("[signatures]\n'*.example' = []", "expected names that begin with a registry"),
        ("[signatures]\n'registry.example/' = []", "expected names that begin with a registry"),
        ("[signatures", "config.toml"),
    ],
)
def test_invalid_rules_are_refused(tmp_path, text, said):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_rules(tmp_path / FILE)
    assert said in caught.value.brief
    assert str(tmp_path) in caught.value.brief


def pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a public key in the PEM format"),
        (b"\xff" * 100_000, "not a public key in the PEM format"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "another kind of key"),
        (pem(rsa.generate_private_key(65537, 2048)), "another kind of key"),
    ],
    ids=["empty", "bytes", "damaged", "P-384", "RSA"],
)
def test_other_keys_are_refused(tmp_path, content, said):
    path = tmp_path / "key.pub"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_key(path)
    assert "P-256" in caught.value.resolution


def test_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['cryptography.exceptions'] = None\n"
        "from pathlib import Path; from pytest_microvm.images.oci.signatures import read_key\n"
        "read_key(Path('x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=guards.PROCESS,
    )  # fmt: skip
    assert "pip install 'pytest-microvm[signatures]'" in done.stderr


@pytest.mark.parametrize(
    ("identity", "reference", "same"),
    [
        ("registry.example/app", "docker://registry.example/app:1", True),
        ("registry.example/app:1", "docker://registry.example/app:1", True),
        ("registry.example/app:2", "docker://registry.example/app:1", False),
        ("registry.example/app:2", "docker://registry.example/app:1@sha256:" + "0" * 64, True),
        ("registry.example/app@sha256:" + "0" * 64, "docker://registry.example/app", True),
        ("registry.example:5000/app", "docker://registry.example:5000/app", True),
        ("registry.example:5000/app", "docker://registry.example/app", False),
        ("registry.example/app/more", "docker://registry.example/app", False),
        ("registry.example/library/app", "docker://registry.example/app:1", True),  # as cosign writes it
        ("registry.example/library/team/app", "docker://registry.example/team/app", False),
        ("app", "docker://registry.example/app", False),
        ("", "docker://registry.example/app", False),
    ],
)
def test_signature_is_for_a_name(identity, reference, same):
    assert _is_for(identity, parse_reference(reference, Path("/"))) == same


def test_names_have_one_form():
    assert repository_of("registry.example/library/app") == "registry.example/app"
    assert repository_of("app") == "app"
    assert repository_of("Registry.example:443/team/app") == "registry.example/team/app"


@given(value=ANY_JSON, place=st.sampled_from(["", "critical", "image", "identity", "type"]))
def test_any_payload_is_answered(value, place):
    claims = {"image": {"docker-manifest-digest": "x"}, "identity": {"docker-reference": "y"}, "type": "z"}
    document = {"critical": {**claims, **({place: value} if place in claims else {})}}
    document = value if not place else {"critical": value} if place == "critical" else document
    reference = parse_reference("docker://registry.example/app", Path("/"))
    assert _wrong(json.dumps(document).encode(), reference, "sha256:" + "0" * 64)


@given(value=ANY_JSON, place=st.sampled_from(["layers", "config", "layer", "size", "annotations"]))
def test_any_manifest_of_signatures_is_answered(value, place):
    layer = {"mediaType": PAYLOAD, "digest": "x", "size": 1, "annotations": {SIGNATURE: "AAAA"}}
    document = {"config": {"size": 1}, "layers": [{**layer, place: value} if place in layer else layer]}
    document = {**document, place: value} if place in document else document
    document = {**document, "layers": [value]} if place == "layer" else document
    parts = _parts(document)
    assert parts is None or all(isinstance(signature, bytes) for _digest, signature in _entries(parts))
