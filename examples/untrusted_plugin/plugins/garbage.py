"""Answers with bytes that are nothing."""

import os
import sys

sys.stdout.buffer.write(b"\x1b]0;owned\x07" + os.urandom(1000))
