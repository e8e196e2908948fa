#!/bin/sh
ln -s @FOLDER@ out
