#!/bin/sh
echo x >>@OUTSIDE@ || true
echo x >@FOLDER@/new || true
