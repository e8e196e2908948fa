#!/bin/sh
ls >/dev/null
