#!/bin/sh
echo x >>notes
