#!/bin/sh
@SH@
