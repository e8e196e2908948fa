"""Run somebody else's plug-in in a throwaway machine: JSON in, JSON out, under strict quotas.

python host.py plugins/count_words.py '{"text": "as you like it"}'
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pytest_microvm import MachineError, MachineSpec, MicroVM, QuotaExceeded

MIB = 1024**2
SPEC = MachineSpec(
    image="python",
    cpus=1,
    memory=256 * MIB,
    disk=64 * MIB,
    pids=32,  # processes and threads at the same time
    timeout=10,  # seconds of each step: copying, running
    cpu_seconds=5,
    output=1 * MIB,  # of stdout and stderr together
    lifetime=30,  # seconds that the machine exists, whatever it does
)
MAX_DEPTH = 32  # of an answer: whoever walks through it later may do so recursively
MAX_DIGITS = 100
MAX_REASON = 500


@dataclass(frozen=True)
class Result:
    """What became of a plug-in's run. Whatever comes from the plug-in is its word, not a fact.

    Args:
        verdict: ``ok``: it answered; ``failed``: it ended without an answer that can be used; ``quota``: it
            used more than it may; ``crashed``: its machine ended.
        answer: With ``ok``, what it answered.
        reason: Otherwise, why; may quote the plug-in, control characters and all.
        quota: With ``quota``, the name of the quota.
        limit: What was allowed, in bytes, seconds or processes.
        observed: What was seen, in the same unit.
    """

    verdict: Literal["ok", "failed", "quota", "crashed"]
    answer: Any = None
    reason: str = ""
    quota: str = ""
    limit: float = 0
    observed: float = 0


def run_plugin(path: Path, data: Any, start: Callable[[MachineSpec], MicroVM] = MicroVM.start) -> Result:
    """Run a plug-in in a machine of its own, give it ``data`` and return what became of it.

    Args:
        path: The plug-in, a Python file: JSON on stdin, JSON on stdout.
        data: What it gets; anything that JSON can say.
        start: Starts the machine.

    Raises:
        pytest_microvm.MicroVMError: No machine could be started. That is not the plug-in's fault.
    """
    with start(SPEC) as vm:
        try:
            vm.push(path, "/plugin.py")
            vm.run(["chmod", "a+r", "/plugin.py"], check=True)
            # Not root, and nothing of the machine's own settings: one wall more costs nothing.
            command = ["python3", "-I", "/plugin.py"]
            done = vm.run(command, input=json.dumps(data).encode(), user="nobody", cwd="/tmp", text=False)
        except QuotaExceeded as error:
            return Result("quota", None, str(error), error.quota, error.limit, error.observed)
        except MachineError as error:
            return Result("crashed", reason=error.brief)
    if done.returncode != 0:
        said = done.stderr[-MAX_REASON:].decode(errors="replace")
        return Result("failed", reason=f"exit status {done.returncode}: {said}")
    try:
        return Result("ok", parse_answer(done.stdout))
    except ValueError as error:
        return Result("failed", reason=f"not an answer: {error}"[:MAX_REASON])


def parse_answer(raw: bytes) -> Any:
    """Return an answer. Its length is bounded by the quota ``output``; the rest is bounded here.

    Raises:
        ValueError: It is not JSON, or nothing that this program wants to handle.
    """
    try:
        answer = json.loads(raw, parse_int=_whole, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [answer], 0
    while level := [child for value in level for child in _children(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return answer


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # the time to convert them grows with their square
        raise ValueError("a number with too many digits")
    return int(digits)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def main() -> int:
    """Run the plug-in that the command line names; print the result as JSON."""
    parser = argparse.ArgumentParser(description="Run a plug-in in a throwaway machine.")
    parser.add_argument("plugin", type=Path)
    parser.add_argument("data", type=json.loads, nargs="?", help="what the plug-in gets, as JSON")
    arguments = parser.parse_args()
    result = run_plugin(arguments.plugin, arguments.data)
    print(json.dumps(asdict(result), indent=2))  # ASCII alone: no text of a plug-in reaches the terminal
    return 0 if result.verdict == "ok" else 1


if __name__ == "__main__":
    raise SystemExit(main())
