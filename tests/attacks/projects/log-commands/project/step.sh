#!/bin/sh
printf '::add-mask::a\n  ::error::forged\n\r::set-output name=x::y\n##[error]forged\n##vso[task.complete result=Succeeded]\n'
printf '##teamcity[buildStatus status=\047SUCCESS\047]\n\033]0;forged\007\033[2J\033[31m:\033[0m:error::forged\n'
printf 'section_start:1:forged\r\033[0Kforged\nsection_end:1:forged\r\033[0K\n' >&2
printf '\302\2332J\342\200\256forged\342\200\250::error::forged\n== main / test: passed, 9 tests\n\377\n'
echo the last line
