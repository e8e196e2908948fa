"""What the plug-in costs a pytest run that does not use it: ``--collect-only`` on an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from measure import Samples, promise

ROUNDS = 25


def main() -> list[dict[str, object]]:
    """Measure in turn with and without, print, and return what was promised."""
    # the other plug-ins of this environment only add noise: hypothesis alone takes half a second
    others = ["-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:xdist.looponfail"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *others]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    # platformdirs is ours to answer for: it comes along with us, and has a plug-in of its own
    none = ["-p", "no:microvm", "-p", "no:platformdirs"]
    without, with_it = Samples(), Samples()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for samples, extra in ((without, none), (with_it, [])):
                with samples.timing():
                    subprocess.run(
                        [*command, *extra],
                        cwd=folder,
                        env=environment,
                        check=False,
                        stdout=subprocess.DEVNULL,
                    )
    differences = Samples([a - b for a, b in zip(with_it.values, without.values, strict=True)])
    print(f"without  {without} s")
    print(f"with     {with_it} s")
    return [promise("the plug-in, unused", differences.median * 1000, 20, " ms")]


if __name__ == "__main__":
    main()
