#!/bin/sh
echo x >out/new
