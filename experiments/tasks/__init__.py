"""Tasks by name: what a config trains."""

from collections.abc import Callable

from experiments.tasks.classification import classification
from experiments.tasks.language import language_model
from experiments.tasks.shared import Shared
from experiments.tasks.task import Config, Task

__all__ = ["TASKS", "Shared", "Task", "classification", "language_model", "make"]

TASKS: dict[str, Callable[[Config], Task]] = {
    "classification": classification,
    "language_model": language_model,
}


def make(config: Config) -> Task:
    """The task named by `config.task`.

    Raises:
      ValueError: no such task, or a setting it refuses.
    """
    if config.task not in TASKS:
        raise ValueError(
            f"config.task is {config.task!r}; possible are {', '.join(TASKS)}"
        )
    return TASKS[config.task](config)
