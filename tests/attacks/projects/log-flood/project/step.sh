#!/bin/sh
yes ::error::forged
