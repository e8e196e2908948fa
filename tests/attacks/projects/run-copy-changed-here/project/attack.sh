#!/bin/sh
echo theirs >notes
