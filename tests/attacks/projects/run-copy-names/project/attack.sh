#!/bin/sh
ln -s /etc/passwd "$(printf '\033]52;c;ZXZpbA==\007')"
ln -s /etc/passwd "$(printf 'x\n::error title=forged::x')"
ln -s /etc/passwd '::error title=forged::x'
ls
