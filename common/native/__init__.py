"""The C extension that both daemons share, and the Python around its loops."""

from typing import Any, TypeAlias

# A C struct or pointer: cffi knows its type, mypy does not.
CData: TypeAlias = Any
