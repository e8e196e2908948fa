#!/bin/sh
echo '::error title=forged::x'
echo '  ::add-path::/evil' >&2
echo 'x ##[error]forged'
echo '##vso[task.setvariable]x'
