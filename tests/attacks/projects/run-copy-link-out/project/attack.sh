#!/bin/sh
rm -r data
ln -s @FOLDER@ data
