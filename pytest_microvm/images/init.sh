#!/bin/busybox sh
# First program of a machine: find the disks, lay out the root file system, become the agent.
# busybox runs with its applets inside the shell where it can: every fork costs under emulation.

fail() {
	echo "microvm: $1"
	/bin/busybox poweroff -f
	/bin/busybox reboot -f
}

/bin/busybox mount -t proc proc /proc || fail "cannot mount /proc"
read -r words </proc/cmdline
case " $words " in
*" microvm.probe=1 "*)
	echo "microvm-probe-ok" >/dev/console
	/bin/busybox reboot -f
	;;
esac
/bin/busybox mount -t sysfs sys /sys || fail "cannot mount /sys"
/bin/busybox mount -t devtmpfs dev /dev || fail "cannot mount /dev"

while read -r module; do
	/bin/busybox insmod "/mods/$module" || fail "cannot load the kernel module $module"
done </mods/order

# root, layers and runtime are read-only; the scratch disk is the machine's disk quota, formatted by the host
/bin/busybox mount -t squashfs -o ro /dev/vda /mnt/root || fail "cannot mount the root file system (/dev/vda)"
if [ -e /dev/vdc ]; then
	/bin/busybox mount -t ext4 -o rw,noatime /dev/vdc /mnt/scratch || fail "cannot mount the scratch disk (/dev/vdc)"
else
	/bin/busybox mount -t tmpfs -o mode=0755 scratch /mnt/scratch || fail "cannot mount a scratch tmpfs"
fi
# short paths: mount(2) takes a page of options, and an image may have a hundred layers
lower=/mnt/root
count=0
add_layer() {
	count=$((count + 1))
	/bin/busybox mkdir /l/$count
	/bin/busybox mount -t squashfs -o ro "$1" /l/$count || fail "cannot mount a layer ($1)"
	lower=/l/$count:$lower
}
for letter in d e f g h i j k l m n o p q r s t u v w x y z; do
	[ -e /dev/vd$letter ] || break
	add_layer /dev/vd$letter
done
# the layers that the hypervisor has no virtio-blk slot for are the units of a SCSI controller
for word in $words; do
	[ "${word%%=*}" = microvm.scsi ] || continue
	while read -r module; do
		/bin/busybox insmod "/mods/$module" || fail "cannot load the kernel module $module"
	done </mods/scsi
	unit=0
	while [ $unit -lt "${word#*=}" ]; do
		for device in /sys/bus/scsi/devices/0:0:0:"$unit"/block/*; do
			[ -e "$device" ] || fail "cannot find SCSI disk $unit"
			add_layer "/dev/${device##*/}"
		done
		unit=$((unit + 1))
	done
done
/bin/busybox mkdir -p /mnt/scratch/upper /mnt/scratch/work || fail "cannot write to the scratch disk"
# redirect_dir: folders of the image can be renamed, as on any other file system
layers=lowerdir=$lower,upperdir=/mnt/scratch/upper,workdir=/mnt/scratch/work,redirect_dir=on
/bin/busybox mount -t overlay -o $layers overlay /newroot ||
	fail "cannot lay the scratch disk over the root file system"

cd /newroot || fail "cannot enter the new root"
set --
for folder in proc sys dev run; do
	[ ! -L $folder ] || /bin/busybox rm $folder # it would lead to a folder of the initramfs
	[ -d $folder ] || set -- "$@" $folder
done
for folder in lib etc; do
	[ -e $folder ] || [ -L $folder ] || set -- "$@" $folder
done
[ $# = 0 ] || /bin/busybox mkdir "$@" || fail "cannot make the root's own folders"
[ -e tmp ] || [ -L tmp ] || /bin/busybox mkdir -m 1777 tmp || fail "cannot make /tmp"
# container images have an empty one, or none: their runtimes write it
[ -s etc/hosts ] || [ -L etc/hosts ] || printf '127.0.0.1\tlocalhost\n::1\tlocalhost\n' >etc/hosts
/bin/busybox mount -t tmpfs -o mode=0755,nosuid,nodev run run || fail "cannot mount /run"
/bin/busybox cp -a /run/. run || fail "cannot write to /run"
/bin/busybox mount -t squashfs -o ro /dev/vdb run/microvm/runtime || fail "cannot mount the runtime (/dev/vdb)"
/bin/busybox mount -t tmpfs -o mode=0755,nosuid,nodev code run/microvm/code || fail "cannot mount the agent's code"
[ -d /guest-code ] || fail "the agent's code is missing (/guest-code)"
/bin/busybox cp -R /guest-code/. run/microvm/code || fail "cannot copy the agent's code"
/bin/busybox mount -o remount,ro run/microvm/code || fail "cannot protect the agent's code"

# a root file system with other modules than this kernel's keeps them out of sight
if [ -d run/microvm/runtime/modules ]; then
	{ [ -d lib/modules ] || /bin/busybox mkdir lib/modules; } &&
		/bin/busybox mount -o bind run/microvm/runtime/modules lib/modules
fi

/bin/busybox ifconfig lo 127.0.0.1 up || fail "cannot bring the loopback interface up"
for folder in proc sys dev; do
	/bin/busybox mount -o move /$folder $folder || fail "cannot move /$folder"
done
/bin/busybox cp -a /devices/. dev || fail "cannot write to /dev"
/bin/busybox mount -t devpts -o mode=0620,gid=5,ptmxmode=0666 devpts dev/pts || fail "cannot mount /dev/pts"
/bin/busybox mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm || fail "cannot mount /dev/shm"

runtime=/run/microvm/runtime
loader=
for candidate in run/microvm/runtime/lib64/ld-linux-*; do
	[ -e "$candidate" ] && loader=/$candidate
done
[ -n "$loader" ] || fail "the runtime has no program loader"
exec /bin/busybox switch_root /newroot "$loader" --library-path $runtime/lib $runtime/bin/python3 -I -S -c \
	"import sys; sys.path.insert(0, '/run/microvm/code'); from pytest_microvm.guest.agent import main; main()" \
	</dev/console >/dev/console 2>&1
fail "cannot start the agent"
