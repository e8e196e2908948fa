#!/bin/sh
truncate -s 20G large
