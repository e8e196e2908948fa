#!/bin/sh
mkdir -p .Git/hooks
echo '@SH@' >.Git/hooks/pre-commit
