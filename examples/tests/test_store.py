from concurrent.futures import ThreadPoolExecutor

import pytest

from todofile import Store, Task


def test_an_absent_file_holds_no_task(tmp_path):
    assert Store(tmp_path / "none.txt").tasks() == []


def test_tasks_are_kept_in_their_order(store, sample):
    assert Store(store.path).tasks() == sample


def test_finishing_a_task_writes_it(store):
    assert str(store.finish(2)) == "x (A) call the bank +money"
    assert store.path.read_text().splitlines()[1] == "x (A) call the bank +money"


@pytest.mark.parametrize("number", [0, -1, 5])
def test_finishing_a_task_that_is_not_there(store, number):
    before = store.path.read_text()
    with pytest.raises(IndexError):
        store.finish(number)
    assert store.path.read_text() == before


def test_two_writers_lose_nothing(store, sample):
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda number: Store(store.path).add(Task.parse(f"task {number}")), range(20)))
    assert len(store.tasks()) == len(sample) + 20


def test_the_command_lists_by_urgency(todofile):
    done = todofile("list", "+home")
    assert done.stdout.splitlines() == [
        "(B) 2024-06-01 water the plants +home",
        "x (A) 2024-05-01 pay the rent +money +home",
    ]


def test_the_command_adds_and_finishes(todofile, store):
    assert todofile("add", "(C)", "learn", "to", "juggle").returncode == 0
    assert todofile("done", "5").stdout == "x (C) learn to juggle\n"
    assert store.tasks()[4].done


@pytest.mark.parametrize(
    ("arguments", "returncode", "message"),
    [
        (["dance"], 2, "The command: "),
        (["done", "9"], 1, "todofile: there is no task 9"),
        (["add", " "], 1, "todofile: not a task: ' '"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(todofile, arguments, returncode, message):
    done = todofile(*arguments)
    assert done.returncode == returncode
    assert done.stderr.startswith(message)
