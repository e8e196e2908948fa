"""The lock file: what it says, how it is parsed, and how differences are named."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.lock_file import (
    _FIELDS,
    FILE,
    MAX_SIZE,
    ImageLock,
    differences,
    parse_lock,
    read_lock,
    write_lock,
)
from pytest_microvm.images.lock_pins import _parsed, container_pins, recipe_pins
from support.locks import changed, leaves, replaced

DIGEST = "sha256:" + "1a" * 32
FILES = {
    **dict.fromkeys(("kernel", "initramfs", "runtime", "digest"), DIGEST),
    "file_systems": [DIGEST, DIGEST],
}
CONTAINER = {
    "kind": "container", "reference": "docker://registry.example/app:1", "platform": "linux/amd64",
    "index": DIGEST, "manifest": DIGEST, "configuration": DIGEST, "diff_ids": [DIGEST], "converter": 1,
    **FILES,
}  # fmt: skip
RECIPE = {
    "suite": "bookworm", "mirror": "", "packages": ["git"], "wheels": ["six==1.16.0"],
    "files": {"/etc/motd": f"0644 {DIGEST}"}, "environment": {"LANG": "C.UTF-8"}, "setup": ["true"],
    "resources": {"cpus": 1, "memory": 1024}, "network": ["pip"],
}  # fmt: skip
KIT = {"kind": "kit", "builder": 2, "key": DIGEST, "recipe": RECIPE, "installed": {"git": "1:2.39"}, **FILES}
LEAVES = [("container", field) for field in leaves(CONTAINER)] + [("kit", field) for field in leaves(KIT)]
PINS = {"container": CONTAINER, "kit": KIT}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(DIGEST),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def record(reference):
    """Return the store's record of a pull without an index."""
    digests = dict.fromkeys(("resolved", "manifest", "configuration", "diff_ids"), DIGEST)
    return {"reference": reference, "platform": "linux/amd64", "converter": "1", **digests}


def content(pins, **changes):
    return {"format": 1, "images": {"app": {"x86_64": pins}}, **changes}


def parse(value, tmp_path):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_lock(data, tmp_path / FILE)


def refusal(value, tmp_path):
    with pytest.raises(UsageError) as caught:
        parse(value, tmp_path)
    assert str(tmp_path / FILE) in caught.value.brief
    assert "pytest-microvm lock" in caught.value.resolution
    return caught.value.brief


def test_samples_have_all_fields():
    assert {kind: set(pins) for kind, pins in PINS.items()} == {kind: set(_FIELDS[kind]) for kind in _FIELDS}


def test_code_pins_all_fields(tmp_path):
    files = [tmp_path / ("1a" * 32)] * 4
    image = Image("app", "1a" * 32, "x86_64", *files, (), {}, layers=(files[0],))
    assert container_pins(record(CONTAINER["reference"]), image, tmp_path) == {**CONTAINER, "index": ""}
    kit = load_kit("base")
    pins = recipe_pins(kit, 2, "1a" * 32)
    assert set(pins) == {"kind", "builder", "recipe", "key"}
    assert set(pins["recipe"]) == {*kit.recipe(), "resources", "network"} - {"architecture"}
    assert set(pins["recipe"]) == set(RECIPE)


@pytest.mark.parametrize(("kind", "field"), LEAVES)
def test_change_of_one_byte_is_named_with_both_values(tmp_path, kind, field):
    other = changed(PINS[kind], field)
    found = differences(PINS[kind], other)
    assert [one.field for one in found] == [field]
    assert (found[0].locked, found[0].found) != (None, None)
    if field == "kind":
        assert "kind: expected" in refusal(content(other), tmp_path)
    else:
        lock = parse(content(other), tmp_path)
        assert [one.field for one in differences(lock.pins("app", "x86_64"), PINS[kind])] == [field]


def test_missing_and_additional_values_are_named():
    fewer, more = copy.deepcopy(KIT), copy.deepcopy(KIT)
    del fewer["installed"]["git"]
    more["recipe"]["packages"].append("curl")
    assert str(*differences(KIT, fewer)) == 'installed.git: locked "1:2.39", now nothing'
    assert str(*differences(KIT, more)) == 'recipe.packages[1]: locked nothing, now "curl"'


def test_other_kind_is_the_only_difference():
    assert str(*differences(CONTAINER, KIT)) == 'kind: locked "container", now "kit"'


def test_causes_come_before_consequences():
    other = {**CONTAINER, "digest": "x", "manifest": "y", "kernel": "z"}
    assert [one.field for one in differences(CONTAINER, other)] == ["manifest", "kernel", "digest"]


def test_file_is_sorted_and_read_back(tmp_path):
    lock = ImageLock({"b": {"x86_64": KIT}, "a": {"aarch64": CONTAINER, "x86_64": CONTAINER}})
    path = write_lock(tmp_path, lock)
    assert path.read_text() == write_lock(tmp_path, read_lock(tmp_path)).read_text()
    assert list(json.loads(path.read_text())["images"]) == ["a", "b"]
    assert read_lock(tmp_path) == lock
    assert path.stat().st_mode & 0o444 == 0o444
    assert [each.name for each in tmp_path.iterdir()] == [FILE]


def test_project_without_a_lock_has_none(tmp_path):
    assert read_lock(tmp_path) is None


def test_link_is_not_read_and_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / FILE).symlink_to("victim")
    with pytest.raises(UsageError, match="link"):
        read_lock(tmp_path)
    write_lock(tmp_path, ImageLock({}))
    assert (tmp_path / "victim").read_text() == "kept"
    assert not (tmp_path / FILE).is_symlink()


def test_huge_file_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b" " * (MAX_SIZE + 1))
    with pytest.raises(UsageError, match=f"has more than {MAX_SIZE} bytes"):
        read_lock(tmp_path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"format": 1, "format": 1, "images": {}}', "a key comes twice"),
        (b'{"format": NaN, "images": {}}', "NaN is no number"),
        (b"[]", "expected an object with format and images"),
        (b'{"format": 1, "images": {}, "more": 1}', "expected an object with format and images"),
        (b'{"format": 2, "images": {}}', "expected format 1, got 2"),
        (b'{"format": 1, "images": []}', "images: expected an object"),
        (b'{"format": 1, "images": {"a": 1}}', "expected an object with the keys x86_64"),
        (b'{"format": 1, "images": {"a": {"mips": {}}}}', "expected an object with the keys x86_64"),
        (b'{"format": 1, "images": {"": {}}}', "expected the name of an image"),
        (b'{"format": 1, "images": {"a\\u001b[2J": {}}}', "expected the name of an image"),
        (b'{"format": 1, "images": {"\\ud800": {}}}', "expected the name of an image"),
        (b'{"format": 1, "images": {"a": {"x86_64": []}}}', "expected an object, got []"),
    ],
)
def test_invalid_file_is_refused(tmp_path, data, why):
    assert why in refusal(data, tmp_path)


def test_too_many_images_are_refused(tmp_path):
    images = {str(number): {} for number in range(1001)}
    assert "at most 1000 images" in refusal({"format": 1, "images": images}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("container", "kind", ["kit"]),
        ("container", "kernel", "sha256:../../../etc/passwd"),
        ("container", "kernel", DIGEST + "\n"),
        ("container", "file_systems", "../x"),
        ("container", "file_systems", [DIGEST, "x"]),
        ("container", "index", "latest"),
        ("container", "converter", True),
        ("container", "reference", "\ud800"),
        ("kit", "builder", 1.5),
        ("kit", "installed", {"git": 1}),
        ("kit", "recipe", []),
        ("kit", "recipe", {**RECIPE, "more": None}),
        ("kit", "recipe", {**RECIPE, "packages": [[[[[1]]]]]}),
        ("kit", "recipe", {**RECIPE, "packages": ["\ud800"]}),
        ("kit", "key", "1a" * 32),
        ("kit", "more", 1),
    ],
)
def test_value_of_another_form_is_refused_by_name(tmp_path, kind, field, value):
    said = refusal(content({**PINS[kind], field: value}), tmp_path)
    assert 'image "app" for x86_64: ' in said
    assert field in said
    assert said.isprintable()


@pytest.mark.parametrize("kind", PINS)
def test_missing_field_is_refused_by_name(tmp_path, kind):
    for field in _FIELDS[kind]:
        pins = {key: value for key, value in PINS[kind].items() if key != field}
        assert field in refusal(content(pins), tmp_path)


@given(leaf=st.sampled_from(LEAVES), value=ANY_JSON)
def test_any_value_is_accepted_or_refused(leaf, value):
    kind, field = leaf
    other = replaced(PINS[kind], field, value)
    said, found = "", []
    try:
        lock = parse(content(other), Path("/project"))
        found = [one.field for one in differences(PINS[kind], lock.pins("app", "x86_64"))]
    except UsageError as error:
        said = error.brief
    assert len(said) < 1000
    assert all(one.startswith(field) for one in found)


def test_hostile_values_are_shown_safely():
    shown = str(*differences(KIT, {**KIT, "installed": {"git": "\x1b[2J" + "x" * 1000}}))
    assert shown.isprintable()
    assert len(shown) < 300


def test_only_installed_packages_count():
    status = (
        "Package: dpkg\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.21\nTag: x\n y\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n\n"
        "Package: libc6\nStatus: install ok installed\nArchitecture: i386\nVersion: 2.36\n\n"
        "Package: tzdata\nStatus: hold ok installed\nArchitecture: all\nVersion: 2024a\n"
    )
    assert _parsed(status, "amd64") == {"dpkg": "1.21", "libc6:i386": "2.36", "tzdata": "2024a"}


def test_folders_of_this_computer_are_not_in_the_file(tmp_path):
    files = [tmp_path / ("1a" * 32)] * 4
    image = Image("app", "1a" * 32, "x86_64", *files, (), {})
    for reference, shown in [
        (f"oci:{tmp_path}/build/image:1", "oci:build/image:1"),
        ("oci:/elsewhere/image:1", "oci:image:1"),
        ("oci-archive:/elsewhere/image.tar", "oci-archive:image.tar"),
    ]:
        assert container_pins(record(reference), image, tmp_path)["reference"] == shown
