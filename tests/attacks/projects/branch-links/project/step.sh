#!/bin/sh
mkdir -p out
echo x >file || true
echo x >folder/made || true
rm -rf folder/* || true
echo x >out/made
ln -s / out/root
ln -s @FOLDER@ out/folder
mkfifo out/pipe
mknod out/null c 1 3 || true
