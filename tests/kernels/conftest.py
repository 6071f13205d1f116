"""Tests find the fixture `library` here."""

from emulated_libraries import library  # noqa: F401
