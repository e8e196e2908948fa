#!/usr/bin/env bash
# Put the command pytest-microvm on the PATH of later steps: from the action's own ref, in an environment of its
# own that shadows no program of the job; or the one that the Python named by PYTHON has already.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mktemp -d "$RUNNER_TEMP/pytest-microvm.XXXXXX")

python=${PYTHON:-}
if [ -z "$python" ]; then
    "$SETUP_PYTHON" -m venv "$folder/venv"
    python=$folder/venv/bin/python
    printf '%s\n' "${REQUIREMENTS:-}" >"$folder/requirements.txt"
    "$python" -m pip install --quiet --disable-pip-version-check \
        "${root}[network,xdist]" --requirement "$folder/requirements.txt"
fi
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
if [ ! -x "$scripts/pytest-microvm" ]; then
    echo "::error title=pytest-microvm::the Python named by the input 'python' has no pytest-microvm"
    exit 1
fi
mkdir "$folder/bin"
ln -s "$scripts/pytest-microvm" "$folder/bin/pytest-microvm"
printf '%s\n' "$folder/bin" >>"$GITHUB_PATH"
printf 'folder=%s\n' "$folder" >>"$GITHUB_OUTPUT"
