#!/bin/sh
echo the step of the branch
ls -A . reports
