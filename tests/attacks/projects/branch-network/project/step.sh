#!/bin/sh
echo connecting
address=@LISTENER@
for host in "${address%:*}" 10.0.2.2 localhost; do
    timeout 5 bash -c "echo x >/dev/tcp/$host/${address#*:}" && exit 0
done
exit 1
