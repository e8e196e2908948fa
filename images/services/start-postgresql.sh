#!/bin/sh
# Make a cluster whose superuser needs no password inside the machine, and start it.
# The machine is thrown away: nothing waits for the disk.
set -e
version=$(ls /usr/lib/postgresql)
pg_createcluster "$version" main -- --encoding=UTF8 --no-sync
cd "/etc/postgresql/$version/main"
cat >pg_hba.conf <<'END'
local all all trust
host all all 127.0.0.1/32 trust
host all all ::1/128 trust
END
printf 'fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n' >conf.d/microvm.conf
exec pg_ctlcluster "$version" main start
