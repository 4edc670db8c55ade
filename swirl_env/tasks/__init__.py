"""Task sets: questions, gold answers, documents and the official metric, one file a set."""

from swirl_env.tasks.base import TaskSet, load_tasks, options_of

__all__ = ["TaskSet", "load_tasks", "options_of"]
