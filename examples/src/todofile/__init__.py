"""Tasks in a text file: one line each, priority, text, +projects and a mark when done."""

from todofile.store import Store
from todofile.task import Task, TaskError

__all__ = ["Store", "Task", "TaskError"]
