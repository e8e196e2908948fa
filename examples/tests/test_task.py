from datetime import date

import pytest

from todofile import Task, TaskError


@pytest.mark.parametrize(
    "line",
    [
        "buy milk",
        "(A) buy milk",
        "2024-02-29 buy milk",
        "(Z) 2024-01-31 buy milk +home",
        "x (A) 2024-01-31 buy milk +home +shop",
    ],
)
def test_a_line_survives_the_way_there_and_back(line):
    assert str(Task.parse(line)) == line


@pytest.mark.parametrize("line", ["", "   ", "2023-02-29 no such day"])
def test_what_is_not_a_task(line):
    with pytest.raises(TaskError, match="not a"):
        Task.parse(line)


def test_projects():
    assert Task.parse("paint +home the +garden fence, 2+2").projects == {"home", "garden"}


@pytest.fixture(scope="module")
def by_urgency(sample):
    return [task.text for task in sorted(sample)]


class TestUrgency:
    def test_priority_comes_first(self, by_urgency):
        assert by_urgency[0] == "call the bank +money"

    def test_what_is_done_comes_last(self, by_urgency):
        assert by_urgency[-1] == "pay the rent +money +home"


def test_finishing_changes_nothing_else():
    task = Task.parse("(A) 2024-05-01 pay the rent")
    assert task.finished() == Task(done=True, priority="A", due=date(2024, 5, 1), text="pay the rent")
    assert not task.done
