# What the cdef declares. A test checks that both name the same things.
from typing import Any

ffi: Any
lib: Any
