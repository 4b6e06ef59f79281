"""Experiments as recipes: ``quail run``. ``recipe`` says what a recipe may hold, ``runner`` runs one."""
