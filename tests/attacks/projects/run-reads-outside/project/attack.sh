#!/bin/sh
cat @OUTSIDE@ @FOLDER@/kept >got 2>/dev/null || true
