#!/bin/sh
rm notes
ln -s ../@OUTSIDE_NAME@ notes
