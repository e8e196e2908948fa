#!/bin/sh
echo "stamp: $(cat stamp.txt)"
