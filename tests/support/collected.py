"""A small collection as a guest sends it, record by record, and values to replace a part of it."""

import json

from hypothesis import strategies as st

GUEST = {"k": "guest", "python": "3.11", "pytest": "7.2", "header": ["a line"]}
FILE = {
    "k": "node",
    "parent": 0,
    "kind": "file",
    "class": "Module",
    "name": "test_a.py",
    "nodeid": "test_a.py",
    "path": "/p/test_a.py",
    "marks": [],
    "extra": [],
}
ITEM = {
    "k": "node",
    "parent": 1,
    "kind": "item",
    "class": "Function",
    "name": "test_a",
    "nodeid": "test_a.py::test_a",
    "path": "/p/test_a.py",
    "marks": [["slow", [1], {"level": 2}]],
    "extra": ["word"],
    "location": ["test_a.py", 3, "test_a"],
    "attributes": ["own"],
}
SESSION = {"k": "collected", "node": 0, "outcome": "passed", "result": [1]}
MODULE = {"k": "collected", "node": 1, "outcome": "passed", "result": [2]}
ORDER = {"k": "items", "order": [2], "markers": ["slow: takes long"]}
END = {"k": "end"}
GOOD = [GUEST, FILE, ITEM, SESSION, MODULE, ORDER, END]
"""A whole collection: one file with one test."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
"""Any value that JSON can have, of a small size."""


def lines(*records):
    """Return records as a guest sends them: JSON lines, in bytes."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()
