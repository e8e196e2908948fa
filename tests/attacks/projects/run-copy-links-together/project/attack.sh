#!/bin/sh
mkdir -p deep/er
ln -s deep/er short
ln -s short/../../../@FOLDER_NAME@ out
