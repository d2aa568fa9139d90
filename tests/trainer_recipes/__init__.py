"""Recipes of docs/trainers.md, taken from the page and run in their trainers: ``python -m tests.trainer_recipes``."""
