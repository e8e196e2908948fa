#!/bin/sh
printf '%70000s:' ''
sleep 1
echo ':error title=forged::x'
printf '%70000s#' x
sleep 1
echo '#[error]forged'
