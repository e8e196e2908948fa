"""Fails as any program can."""

import json
import sys

print(json.load(sys.stdin)["no such key"])
