#!/usr/bin/env bash
# Let this user open /dev/kvm, the way GitHub documents it for its runners. Run it after the packages: those of
# QEMU bring udev rules of their own. Without the device, or without the right to change it, machines are emulated.
set -euo pipefail
device=${1:-/dev/kvm}

if [ ! -e "$device" ]; then
    echo "there is no $device: machines will be emulated (TCG)"
    exit 0
fi
may_open() { [ -r "$device" ] && [ -w "$device" ]; }
may_open && exit 0
if ! command -v sudo >/dev/null; then
    echo "this user may not open $device, and there is no sudo: machines will be emulated (TCG)"
    exit 0
fi
rule='KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"'
printf '%s\n' "$rule" | sudo tee /etc/udev/rules.d/99-kvm4all.rules >/dev/null
sudo udevadm control --reload-rules
sudo udevadm trigger --name-match=kvm
sudo udevadm settle # the rule is applied when the event has been handled, not when it was triggered
may_open || echo "this user still may not open $device: machines will be emulated (TCG)"
