"""Registry of the evaluation tasks: `evaluation.tasks` in a recipe names entries. A task is a file with a subclass of
Task, and its name here.
"""

from __future__ import annotations

from harness.evaluate.tasks.category import CategoryTask
from harness.evaluate.tasks.photo import PhotoTask
from harness.evaluate.tasks.same_product import SameProductTask
from harness.evaluate.tasks.task import Task
from harness.evaluate.tasks.text import TextTask

TASKS: dict[str, type[Task]] = {task.name: task for task in (PhotoTask, TextTask, SameProductTask, CategoryTask)}
