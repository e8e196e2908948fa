#!/usr/bin/env bash
# Set up a checkout: install missing programs (Debian, Ubuntu), then make .venv.
# A second run changes and prints nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ci/packages.sh
exec 9<pyproject.toml
flock 9 # two `make` at once: the second waits

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

# The same for development.
missing_here() {
    missing_packages
    command -v bwrap >/dev/null || echo bubblewrap # machines can do without, their test cannot
    command -v cpio >/dev/null || echo cpio # a test has it unpack what we pack
    # tests pull container images from a registry of their own, with musl's loader in one of them
    command -v skopeo >/dev/null || echo skopeo
    command -v zstd >/dev/null || echo zstd
    command -v docker-registry >/dev/null || echo docker-registry
    [ -e /bin/busybox ] || echo busybox-static
    compgen -G '/lib/ld-musl-*.so.1' >/dev/null || echo musl
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
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
ensure_packages missing_here

# .venv is up to date when it was made here, by this script, for this pyproject.toml.
wanted=$({ pwd && cat pyproject.toml ci/setup.sh; } | sha256sum)
if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    rm -f .venv/ready
    venv_works || make_venv
    say "installing the Python packages into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' --group dev
    printf '%s\n' "$wanted" >.venv/ready
fi
