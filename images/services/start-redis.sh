#!/bin/sh
# Start Redis as its own user; it saves nothing by itself.
set -e
install -d -o redis -g redis /run/redis
exec runuser -u redis -- redis-server /etc/redis/redis.conf --daemonize no --logfile '' --save ''
