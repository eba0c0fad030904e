"""Modules and objectives: no recipe, no file paths, no collectives except those inside a loss."""
