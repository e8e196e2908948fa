"""Fuzz what takes a guest's bytes, for a bounded time: ``python tests/fuzz/run.py --seconds 60``.

Atheris guides it where it is installed, else hypothesis makes up the bytes. An input that is a finding is
kept below ``.fuzz/findings``; ``--replay FILE`` runs it again. What is learned stays below ``.fuzz/corpus``.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, os.fspath(HERE.parent))
WORK = HERE.parents[1] / ".fuzz"
LONGEST = {"tar": 16384, "link": 8192}
TIMEOUT = 30  # seconds that one input may take
MEMORY = 1024  # MiB


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "60")))
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one kept input again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", help="what to fuzz; everything if omitted")
    options = parser.parse_args()
    if options.one:
        return fuzz(options.one, options.seconds)
    if options.replay:
        return replay(options.replay)
    from fuzz.targets import TARGETS  # noqa: PLC0415 - under atheris it must be loaded later

    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    share = max(1, options.seconds // len(names))
    print(f"{len(names)} targets, {share} s each, {'atheris' if guided() else 'hypothesis: no atheris here'}")
    found = [name for name in names if not passes(name, share)]
    for name in found:
        print(f"\n{name}: a finding. Its input, newest last:")
        for path in sorted((WORK / "findings" / name).iterdir(), key=lambda path: path.stat().st_mtime)[-3:]:
            print(f"    python tests/fuzz/run.py --replay {path}")
    return 1 if found else 0


def guided():
    return find_spec("atheris") is not None


def passes(name, seconds):
    """Fuzz one target in a process of its own; say how it went."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--one", name, "--seconds", str(seconds)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    done = next((line for line in run.stderr.splitlines() if line.startswith("Done")), "")
    verdict = "ok" if run.returncode == 0 else "FOUND"
    print(f"{name:12} {time.monotonic() - started:5.0f} s  {verdict}  {done}", flush=True)
    if run.returncode:
        print(run.stdout[-4000:], run.stderr[-2000:], sep="\n")
    return run.returncode == 0


def fuzz(name, seconds):
    """Fuzz one target in this process."""
    learned, findings, seeds = WORK / "corpus" / name, WORK / "findings" / name, HERE / "corpus" / name
    learned.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    if not guided():
        return make_up(name, seconds, seeds, findings)
    import atheris  # noqa: PLC0415 - it may be missing

    with atheris.instrument_imports(include=["pytest_microvm", "tarfile"]):
        from fuzz.targets import TARGETS  # noqa: PLC0415
    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-max_len={LONGEST.get(name, 4096)}",
        f"-artifact_prefix={findings}{os.sep}",
        "-print_final_stats=1",
        str(learned),
        str(seeds),
    ]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()
    return 0


def make_up(name, seconds, seeds, findings):
    """Let hypothesis make up bytes, and change the seeds, until the time is over."""
    from hypothesis import HealthCheck, given, settings  # noqa: PLC0415 - not where atheris is
    from hypothesis import strategies as st  # noqa: PLC0415

    from fuzz.targets import TARGETS  # noqa: PLC0415

    good = [path.read_bytes() for path in sorted(seeds.iterdir())]
    cut = st.builds(
        lambda seed, start, end, new: seed[:start] + new + seed[end:],
        st.sampled_from(good),
        st.integers(0, 2000),
        st.integers(0, 2000),
        st.binary(max_size=20),
    )

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=2000) | cut)
    def attempt(data):
        try:
            TARGETS[name](data)
        except BaseException:
            findings.joinpath("made-up").write_bytes(data)  # the last, so the smallest
            raise

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        attempt()
    return 0


def replay(path):
    """Run one input; its target is the name of its folder."""
    from fuzz.targets import TARGETS  # noqa: PLC0415

    TARGETS[path.parent.name](path.read_bytes())
    print("no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
