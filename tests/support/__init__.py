"""Fakes and fixtures that the tests share, each with a name of its own."""
