#!/bin/sh
mkdir out; truncate -s 8G out/large; echo x >out/small
