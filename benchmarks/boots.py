"""Boot again and again, from nothing to the agent's hello; every boot must come up by itself.

Not part of `make bench`: 200 boots take about ten minutes under emulation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import Samples

from pytest_microvm.host.host import Host, guest_code
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.chain import Chain
from pytest_microvm.templates.store import TemplateStore


def main() -> int:
    """Boot, count and print; the exit status says whether all came up at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    host = Host(say=print)
    base = host.base(MachineSpec())
    retried: list[str] = []
    times = Samples()

    def say(line: str) -> None:
        if "again" in line:
            retried.append(line)

    with tempfile.TemporaryDirectory() as folder:
        store = TemplateStore(Path(folder), cap=1024**4)
        chain = Chain(host.hypervisor(base.image.architecture), store, guest_code(), say)
        for number in range(count):
            with times.timing():
                chain.ensure(base).close()
            store.prune()
            if number % 20 == 19:
                print(f"{number + 1} boots, {len(retried)} needed a second try, {times} s", flush=True)
    host.close()
    print(
        f"accelerator {base.accelerator.name}, machine {base.accelerator.machine}: "
        f"{count} boots, {len(retried)} needed a second try; {times} s each, frozen included"
    )
    return bool(retried)


if __name__ == "__main__":
    raise SystemExit(main())
