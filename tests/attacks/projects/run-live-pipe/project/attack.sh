#!/bin/sh
mkfifo pipe
mknod disk b 7 0 || true
