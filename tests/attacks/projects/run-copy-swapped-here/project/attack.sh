#!/bin/sh
echo x >data/new
