"""Script for a Python that has pip: print the indexes that pip uses and the hosts of their files.

The script runs outside this package: its text is passed to an interpreter's standard input. pip itself reads
its configuration and queries its indexes, with its own certificates, proxies and logins. The output
contains no user names or passwords.
"""

import json
import logging
import sys
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pip._internal.commands import create_command

PROJECTS = ("pip", "setuptools", "wheel", "packaging")  # small, and on about every index
TIMEOUT = 15.0  # seconds without data from an index


def main() -> None:
    """Print pip's indexes, links and file hosts as JSON."""
    logging.basicConfig(format="%(message)s")  # errors of indexes, to stderr
    logging.getLogger("pip._internal.index.collector").setLevel(logging.INFO)
    command: Any = create_command("install")
    options, _ = command.parser.parse_args([])
    options.retries, options.timeout, options.no_input, options.python = 1, TIMEOUT, True, None
    indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
    web = [url for url in indexes if url and urlsplit(url).scheme in ("http", "https")]
    links = [url for url in options.find_links if urlsplit(url).scheme in ("http", "https")]
    told: dict[str, Any] = {
        "indexes": [bare(url) for url in web],
        "links": [bare(url) for url in links],
        "trusted": list(options.trusted_hosts),
        "login": any("@" in urlsplit(url).netloc for url in [*web, *links]),
        "files": {},
    }
    with command.main_context():
        session = command._build_session(options)  # noqa: SLF001
        for url in [*web, *links]:
            options.index_url, options.extra_index_urls, options.no_index = url, [], url in links
            options.find_links = [url] if url in links else []
            finder = command._build_package_finder(options, session)  # noqa: SLF001
            finder._ignore_requires_python = True  # noqa: SLF001 - nothing is installed
            told["files"][bare(url)] = sorted(asked(finder))
    sys.stdout.write(json.dumps(told))


def asked(finder: Any) -> set[str]:
    """Return the hosts from which an index serves files, as ``scheme://host:port``."""
    for project in PROJECTS:
        found = {urlsplit(one.link.url) for one in finder.find_all_candidates(project)}
        hosts = {urlunsplit((url.scheme, url.netloc.rpartition("@")[2], "", "", "")) for url in found}
        if hosts:
            return {host for host in hosts if host.startswith(("http://", "https://"))}
    return set()


def bare(url: str) -> str:
    """Return a URL without user name and password."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


if __name__ == "__main__":
    main()
