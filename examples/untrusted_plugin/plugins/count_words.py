"""A plug-in as it should be: counts the words of a text."""

import collections
import json
import sys

words = json.load(sys.stdin)["text"].lower().split()
json.dump({"words": len(words), "most_common": collections.Counter(words).most_common(3)}, sys.stdout)
