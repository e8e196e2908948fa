#!/bin/sh
# Start Docker's daemon with its storage on the scratch disk and the machine's proxy as its way out.
set -e

# The root file system is an overlay, over which Docker cannot lay another one: take a folder of the disk below it.
disk=$(mktemp -d)
mount -t ext4 /dev/vdc "$disk"
mkdir -p "$disk/docker" /var/lib/docker
mount --bind "$disk/docker" /var/lib/docker
umount "$disk"
rmdir "$disk"

modprobe -a bridge br_netfilter veth overlay nft_compat nft_chain_nat xt_MASQUERADE xt_addrtype xt_conntrack

# Ports that Docker chooses for containers come from this range, so that all of it can be forwarded.
echo '49152 49215' >/proc/sys/net/ipv4/ip_local_port_range

# The proxy denies everything that no network rule of the machine allows.
export HTTP_PROXY=http://127.0.0.1:3128 HTTPS_PROXY=http://127.0.0.1:3128
export NO_PROXY=localhost,127.0.0.1,::1
exec dockerd --storage-driver=overlay2 --log-level=warn
