"""The migration stream: bytes to records and back, with no I/O in it.

Encoders return bytes and raise ValueError when asked for what the format
cannot say. Decoders end in ``_untrusted``, because the peer chose the bytes;
they raise StreamError and nothing else of their own, check every size against
a named limit before they read that much, and take a function ``read(size)``
that returns exactly `size` bytes or raises. So one decoder serves a socket, a
file and a test (`fields.Reader`, `fields.over`).

Which bytes come when is told in docs/wire-format.md.
"""
