#!/bin/sh
git config core.fsmonitor 'echo fsmonitor >>@MARKER@; false'
