#!/usr/bin/env bash
# Install the system packages that machines need and that are missing; says nothing if there are none.
set -euo pipefail
# shellcheck source=ci/packages.sh
. "$(dirname "${BASH_SOURCE[0]}")/../ci/packages.sh"
ensure_packages missing_packages
