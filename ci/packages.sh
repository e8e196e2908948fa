# shellcheck shell=bash
# Find and install missing system packages that machines need.
# Sourced by ci/setup.sh and github-action/setup.sh.

PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" # where Debian keeps mke2fs, also for users who do not search there

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  next step: %s\n' "$*" >&2
    exit 1
}

# Print the names of missing packages for building images and running machines: rows of needed.txt.
missing_packages() {
    local architecture package where purpose programs variable
    architecture=$(uname -m)
    case $architecture in
        x86_64 | aarch64) ;;
        *) fail "machines of the kind $architecture are not supported" "use x86-64 or aarch64" ;;
    esac
    while read -r package where purpose programs; do
        [ "$purpose" != pulls ] || continue # few computers pull container images
        variable=${where%%=*}
        case $where in
            all | "$architecture") ;;
            user) [ "$(id -u)" != 0 ] || continue ;;
            *=*) [ "${!variable:-}" = "${where#*=}" ] || continue ;;
            *) continue ;;
        esac
        # shellcheck disable=SC2086 # several words, and globs
        are_there $programs || echo "$package"
    done <"${BASH_SOURCE[0]%/*}/../pytest_microvm/programs/needed.txt"
}

# Whether all these programs, and files with an absolute path, are there.
are_there() {
    local name
    for name; do
        case $name in
            /*) [ -e "$name" ] || return ;;
            *) command -v "$name" >/dev/null || return ;;
        esac
    done
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
