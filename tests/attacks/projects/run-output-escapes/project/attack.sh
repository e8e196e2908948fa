#!/bin/sh
printf '\033]52;c;ZXZpbA==\007\033]0;owned\007\302\233]x\n'
printf '\033]52;c;ZXZpbA==\033\\\n' >&2
printf '\033]0;owned\007\n' >/dev/console 2>/dev/null || true
