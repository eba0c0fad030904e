"""Tests, mirroring the four folders of the project."""
