"""The options of machines and test runs, each declared once; every front end is generated from this table.

A new quota needs an entry here, a field in :class:`pytest_microvm.settings.spec.MachineSpec` and in
:class:`pytest_microvm.settings.spec.Limits`, and the code that enforces it. pytest loads this module in
every run: it imports nothing heavy, and an option is a named tuple, created in a quarter of a dataclass's
time.
"""

from typing import Any, Literal, NamedTuple

Part = Literal["image", "quota", "grant", "run"]
Kind = Literal[
    "kit", "cpus", "size", "count", "seconds", "rules", "hosts", "credentials", "secrets", "mounts",
    "choice", "flag", "folder", "patterns", "names", "words",
]  # fmt: skip
FrontEnd = Literal["ci", "tox", "gitlab"]

_METAVARS: dict[Kind, str] = {
    "kit": "KIT",
    "cpus": "N",
    "size": "SIZE",
    "count": "N",
    "seconds": "SECONDS",
    "rules": "RULE",
    "hosts": "NAME=ADDRESS[:PORT]",
    "credentials": "SPEC",
    "secrets": "NAME=SOURCE",
    "mounts": "SOURCE:/TARGET[:ro][:git|:live]",
    "folder": "DIR",
    "patterns": "PATTERN",
    "names": "NAME",
    "words": "ARGS",
}


class Option(NamedTuple):
    """An option: a key of the configuration, and an option of pytest.

    All except ``run`` options are also keywords of the marker and the factory, and options of subcommands
    that start a machine; quotas are also keys of a kit's ``resources``.

    Args:
        name: Its key.
        part: Its category: ``image``, ``quota`` and ``grant`` set a machine's image, resource limits, and
            network, secrets and mounts; ``run`` sets how pytest uses machines.
        kind: The kind of its values.
        about: Its description, in one sentence without a full stop.
        example: Sample values for command-line help.
        default: pytest's default, in words.
        least: The smallest value.
        least_for: The purpose for which a smaller size is too little.
        most: The largest value.
        unit: The thing that a count counts.
        choices: The allowed values.
        absent: Front ends that lack it, or that use its key with a different meaning.
    """

    name: str
    part: Part
    kind: Kind
    about: str
    example: str = ""
    default: str = "none"
    least: float = 0
    least_for: str = ""
    most: int = 0
    unit: str = ""
    choices: tuple[str, ...] = ()
    absent: tuple[FrontEnd, ...] = ()

    @property
    def word(self) -> str:
        """Its name on a command line; a repeatable grant's is singular."""
        return (self.name.removesuffix("s") if self.part == "grant" else self.name).replace("_", "-")

    @property
    def repeatable(self) -> bool:
        """True if the option may be repeated on a command line."""
        return self.part == "grant" or self.kind in ("patterns", "names", "words")

    @property
    def help(self) -> str:
        """Its help text for command lines."""
        example = f", such as {self.example}" if self.example else ""
        return f"{self.about}{example}{'; repeatable' if self.repeatable else ''}"

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of argparse's ``add_argument``."""
        if self.kind == "flag":
            return {"action": "store_true", "default": None, "help": self.help}
        values = {"choices": self.choices} if self.choices else {"metavar": _METAVARS[self.kind]}
        return {"action": "append" if self.repeatable else "store", "help": self.help, **values}


# fmt: off
OPTIONS: tuple[Option, ...] = (
    Option("isolation", "run", "choice", "scope of the tests that share a machine", default="test",
           choices=("test", "class", "module", "session")),
    Option("fixtures", "run", "choice",
           "set up fixtures wider than a test once and fork their machine for each test, or repeat them; "
           "auto forks those that are slow", default="auto", choices=("auto", "fork", "repeat")),
    Option("pure_fixtures", "run", "names",
           "session fixture whose set-up depends on the workspace, arguments and environment alone: the "
           "machine in which it stands is kept for later runs", "database"),
    Option("repeat", "run", "count", "run each test this often, and tell how its outcomes differ",
           default="once", unit="times", least=1, most=100_000),
    Option("args", "run", "words", "arguments for pytest inside the machine"),
    Option("image", "image", "kit", "the image: a kit's name or path, or a container image's reference",
           default="python", absent=("gitlab",)),
    Option("locked", "run", "flag", "fail unless images are exactly those that microvm.lock pins",
           default="off"),
    Option("python", "image", "choice",
           "Python of the machine: host mirrors this environment, image is the image's own",
           default="host if neither an image nor prepare is set, else image", choices=("host", "image"),
           absent=("gitlab",)),
    Option("nested", "image", "flag", "give the machine a CPU on which it can run machines with KVM",
           default="off", absent=("tox", "gitlab")),
    Option("cpus", "quota", "cpus", "CPUs of the machine; 0.5 is one vCPU, throttled", default="the kit's",
           least=0.05, most=64),
    Option("memory", "quota", "size", "memory of the machine", "512M", default="the kit's",
           least=128 * 1024**2, least_for="to boot"),
    Option("disk", "quota", "size", "what the machine may write to its disk", "2G", default="the kit's",
           least=16 * 1024**2, least_for="for a file system"),
    Option("pids", "quota", "count", "processes and threads in the machine at the same time",
           unit="processes", least=1, most=4 * 1024**2),  # Linux's own limit (PID_MAX_LIMIT)
    Option("timeout", "quota", "seconds", "seconds that one test or command may take", default="300",
           absent=("ci", "gitlab")),
    Option("cpu_seconds", "quota", "seconds", "seconds of CPU time that the machine may use in total",
           absent=("tox",)),
    Option("output", "quota", "size", "what one test or command may print", "10M", default="64M",
           absent=("tox",)),
    Option("lifetime", "quota", "seconds", "seconds that the machine may exist",
           absent=("ci", "tox", "gitlab")),
    Option("network", "grant", "rules", "what the machine may reach",
           "a host, *.host, host:port, an address range, https://host/path/*, pip, npm, apt, git or all; "
           "deny: in front forbids", default="the kit's, else nothing"),
    Option("hosts", "grant", "hosts", "address of a host name, for the machine's requests",
           "api.example.com=127.0.0.1:8443"),
    Option("network_bytes", "quota", "size", "what the machine may send to and receive from the network",
           "100M", absent=("tox",)),
    Option("connections", "quota", "count", "connections that the machine may make in total",
           unit="connections", least=1, most=10**9 - 1, absent=("tox",)),
    Option("bandwidth", "quota", "size", "bytes per second over the network", "1M", absent=("tox",)),
    Option("fail_on_denied", "run", "flag", "fail a test if one of its network requests was denied",
           default="off"),
    Option("credentials", "grant", "credentials",
           "credential that is added to the machine's requests to one host",
           "host=api.example.com,env=TOKEN"),
    Option("secrets", "grant", "secrets", "secret value that the machine gets",
           "TOKEN=env:TOKEN[,as=file]; file:, command: and keyring: too"),
    Option("mounts", "grant", "mounts", "host directory, copied into the machine, and back unless it is :ro",
           "data:/data:ro; :git hands over a clone, :live shares the directory"),
    Option("retries", "run", "count", "retries of a test whose machine failed before the test started",
           default="2", unit="tries", most=100),
    Option("artifacts", "run", "folder",
           "save console, commands, usage and events of machines that crash or exceed a quota"),
    Option("junit_profile", "run", "choice",
           "consumer that the file of --junitxml is written for",
           default="as pytest writes it", choices=("generic", "github", "gitlab", "jenkins", "buildkite")),
    Option("write_back", "run", "patterns",
           "files of the workspace that tests write and that come back, as in a .gitignore file",
           "docs/*.png"),
    Option("keep_tmp", "run", "flag", "bring the tmp_path of failed tests back to this computer",
           default="off"),
    Option("git", "run", "flag", "give machines the history of HEAD, its tags and the index as .git, for "
           "suites that ask git for their version", default="off"),
    Option("debug_port", "run", "count",
           "port of this computer that leads to the same port of the machine of the present test, for an IDE",
           "5678", unit="as a port", least=1, most=65535),
    Option("pool", "run", "count", "machines that are kept ready for the next tests",
           default="cores, at most 4", unit="machines", most=64),
    Option("require_accel", "run", "choice", "fail unless machines run with this accelerator", default="any",
           choices=("kvm", "hvf", "whpx", "tcg")),
    Option("keep", "run", "choice", "keep the machine of a failed test and print how to enter it",
           default="never", choices=("never", "failed")),
)
# fmt: on
"""Every option, in the order of ``pytest --help``."""

BY_NAME = {option.name: option for option in OPTIONS}
QUOTAS = tuple(option for option in OPTIONS if option.part == "quota")
GRANTS = tuple(option for option in OPTIONS if option.part == "grant")
MACHINE = (BY_NAME["image"], *QUOTAS, *GRANTS, BY_NAME["python"], BY_NAME["nested"])
"""The options of a machine's image, quotas and grants: the keywords of the marker and the factory."""
RUN = tuple(option for option in OPTIONS if option.part == "run")
