"""The launch-chain step that applies a Landlock ruleset to itself and executes the next program.

The step is Perl where the host has it, as Debian and Ubuntu always do, because Perl starts in a millisecond.
Otherwise it is our own Python, which takes ten times as long. Both do the same: set no_new_privs, apply the
ruleset and the filter of system calls, close the ruleset, and execute the next program with an empty
environment.

Sources: prctl(2), landlock_restrict_self(2), seccomp(2); perlfunc(1) of ``syscall`` and ``pack``.
"""

from __future__ import annotations

import platform
import shutil
import sys

from pytest_microvm.hypervisors.seccomp import deny_filter

_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2  # prctl(2)
_RESTRICT_SELF = 446
_PRCTL = {"x86_64": 157, "aarch64": 167}  # the system call's number, which Perl needs

_PERL = f"""
my ($prctl, $ruleset, $filter) = (shift() + 0, shift() + 0, pack("H*", shift));
sub check {{ return if $_[0] == 0; print STDERR "Landlock: $!\\n"; exit 1 }}
check(syscall($prctl, {_SET_NO_NEW_PRIVS}, 1, 0, 0, 0));
check(syscall({_RESTRICT_SELF}, $ruleset, 0));
my $program = pack("S x6 P", length($filter) / 8, $filter);
check(syscall($prctl, {_SET_SECCOMP}, {_MODE_FILTER}, $program, 0, 0));
open(my $file, "<&=", $ruleset) and close($file);
%ENV = ();
exec {{ $ARGV[0] }} @ARGV;
check(-1);
"""

_PYTHON = f"""
import ctypes, os, sys

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

def check(result):
    if result:
        sys.exit("Landlock: " + os.strerror(ctypes.get_errno()))

libc = ctypes.CDLL(None, use_errno=True)
ruleset, instructions, command = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3:]
zero = ctypes.c_ulong(0)
check(libc.prctl({_SET_NO_NEW_PRIVS}, ctypes.c_ulong(1), zero, zero, zero))
check(libc.syscall({_RESTRICT_SELF}, ruleset, 0))
program = Program(len(instructions) // 8, instructions)
check(libc.prctl({_SET_SECCOMP}, ctypes.c_ulong({_MODE_FILTER}), ctypes.byref(program), zero, zero))
os.close(ruleset)
os.execve(command[0], command, {{}})
"""


def find_steps() -> list[tuple[str, ...]]:
    """Return the argv prefixes of programs that can be the step, the fastest first."""
    perl = shutil.which("perl")
    steps: list[tuple[str, ...]] = [(perl, "-e", _PERL, str(_PRCTL[platform.machine()]))] if perl else []
    # The step runs before a change of user. -I and -S ignore the environment, user site and current folder.
    return [*steps, (sys.executable, "-I", "-S", "-B", "-c", _PYTHON)]


def step_command(step: tuple[str, ...], ruleset: int) -> list[str]:
    """Return the argv that applies a ruleset and then executes the command appended to it.

    Args:
        step: One of :func:`find_steps`.
        ruleset: The inherited descriptor of the ruleset.
    """
    return [*step, str(ruleset), deny_filter(platform.machine()).hex()]
