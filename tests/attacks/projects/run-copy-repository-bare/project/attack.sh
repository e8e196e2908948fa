#!/bin/sh
git init -q --bare sub
git -C sub config core.bare false
git -C sub config core.worktree .
git -C sub config core.fsmonitor 'echo fsmonitor >>@MARKER@; false'
