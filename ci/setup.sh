#!/usr/bin/env bash
# Make a checkout ready: install the programs that are missing (Debian, Ubuntu), then make .venv.
# A second run finds everything in place and says nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps mkfs.ext4, also for users who do not search there
exec 9<pyproject.toml
flock 9 # two `make` at once: the second waits

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  next step: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later was found" "install python3 3.10 or later"
}

# What is missing, as the names of the packages that hold it.
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
    command -v bwrap >/dev/null || echo bubblewrap # machines can do without, their test cannot
    command -v cpio >/dev/null || echo cpio # a test has it unpack what we pack
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
    [ "$(id -u)" = 0 ] || command -v newuidmap >/dev/null || echo uidmap
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
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

# A moved or copied .venv has programs that point to where it was; one whose Python is gone does not start.
venv_works() {
    head -n 1 .venv/bin/pip 2>/dev/null | grep -qF "$PWD/.venv/" && .venv/bin/python -m pip --version >/dev/null 2>&1
}

make_venv() {
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' # knows --group
}

python=$(find_python)
packages=$(missing_packages)
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086 # one word, one package
    install_packages $packages
    packages=$(missing_packages)
    [ -z "$packages" ] || fail "still missing after the installation: ${packages//$'\n'/ }" "install them by hand"
fi

# .venv is up to date when it was made here, by this script, for this pyproject.toml.
wanted=$({ pwd && cat pyproject.toml ci/setup.sh; } | sha256sum)
if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    rm -f .venv/ready
    venv_works || make_venv
    say "installing the Python packages into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' --group dev
    printf '%s\n' "$wanted" >.venv/ready
fi
