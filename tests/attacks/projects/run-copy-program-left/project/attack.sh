#!/bin/sh
echo '@SH@' >.envrc
