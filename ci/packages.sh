# shellcheck shell=bash
# Find and install missing system packages that machines need.
# Sourced by ci/setup.sh and github-action/setup.sh.

PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps mkfs.ext4, also for users who do not search there

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  next step: %s\n' "$*" >&2
    exit 1
}

# Print the names of missing packages for building images and running machines.
missing_packages() {
    case "$(uname -m)" in
        x86_64) command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86 ;;
        aarch64) command -v qemu-system-aarch64 >/dev/null || echo qemu-system-arm ;;
        *) fail "machines of the kind $(uname -m) are not supported" "use x86-64 or aarch64" ;;
    esac
    command -v mmdebstrap >/dev/null || echo mmdebstrap
    command -v mksquashfs >/dev/null || echo squashfs-tools
    command -v mkfs.ext4 >/dev/null || echo e2fsprogs
    command -v setpriv >/dev/null || echo util-linux
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
    [ "$(id -u)" = 0 ] || command -v newuidmap >/dev/null || echo uidmap
}

install_packages() {
    local as_root=()
    command -v apt-get >/dev/null || fail "missing, and there is no apt-get: $*" "install what these Debian packages hold"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "missing: $*" "as root: apt-get install --no-install-recommends $*"
        as_root=(sudo)
    fi
    say "installing $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "$@" >/dev/null
}

# Install the packages that the given function prints; fail if it still prints some afterwards.
ensure_packages() {
    local packages
    packages=$("$1")
    [ -n "$packages" ] || return 0
    # shellcheck disable=SC2086 # one word, one package
    install_packages $packages
    packages=$("$1")
    [ -z "$packages" ] || fail "still missing after the installation: ${packages//$'\n'/ }" "install them by hand"
}
