"""The tasks that a recipe can name, a file each: what is learned, what is forgotten and what is measured."""

from .base import Task
from .mide22_classification import Mide22Classification
from .mide22_language import Mide22Language
from .muse_news_knowmem import MuseNewsKnowMem
from .tofu import Tofu

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Mide22Classification, Mide22Language, MuseNewsKnowMem, Tofu)
}
