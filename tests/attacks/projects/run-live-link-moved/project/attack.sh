#!/bin/sh
mv a/up up
