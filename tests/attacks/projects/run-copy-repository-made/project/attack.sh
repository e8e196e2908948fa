#!/bin/sh
git init -q sub
git -C sub config core.fsmonitor 'echo fsmonitor >>@MARKER@; false'
