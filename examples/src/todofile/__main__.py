"""The command: ``python -m todofile FILE add TEXT | list [+PROJECT] | done NUMBER``."""

from __future__ import annotations

import sys

from todofile import Store, Task


def add(store: Store, words: list[str]) -> None:
    store.add(Task.parse(" ".join(words)))


def done(store: Store, words: list[str]) -> None:
    print(store.finish(int(words[0])))


def show(store: Store, words: list[str]) -> None:
    wanted = {word.removeprefix("+") for word in words}
    for task in sorted(store.tasks()):
        if wanted <= task.projects:
            print(task)


VERBS = {"add": add, "done": done, "list": show}


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[1] not in VERBS:
        print(__doc__, file=sys.stderr)
        return 2
    path, verb, *words = arguments
    try:
        VERBS[verb](Store(path), words)
    except (ValueError, IndexError) as error:
        print(f"todofile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
