"""No two modules of the package define a class of the same name."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import pytest_microvm

PACKAGE = Path(pytest_microvm.__file__).parent


def class_names(tree):
    """Return the names of a module's top-level classes, without leading underscores."""
    return {node.name.lstrip("_") for node in tree.body if isinstance(node, ast.ClassDef)}


def shared_names(trees):
    """Return the class names that several modules define, with the modules' paths."""
    modules = defaultdict(list)
    for path, tree in trees.items():
        for name in class_names(tree):
            modules[name].append(path)
    return {name: paths for name, paths in sorted(modules.items()) if len(paths) > 1}


def test_class_name_has_one_definition():
    trees = {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert trees
    shared = shared_names(trees)
    assert not shared, "name each class by what distinguishes it, for example StreamTransport"


@pytest.mark.parametrize("second", ["class Stream: pass", "class _Stream(Base): pass"])
def test_class_name_in_two_modules_is_found(second):
    trees = {"a.py": ast.parse("class Stream: pass"), "b.py": ast.parse(second)}
    assert shared_names(trees) == {"Stream": ["a.py", "b.py"]}


def test_nested_class_name_is_ignored():
    trees = {"a.py": ast.parse("class A:\n    class Meta: pass"), "b.py": ast.parse("class Meta: pass")}
    assert not shared_names(trees)
