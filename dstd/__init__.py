"""The destination daemon: receives a running guest on this host."""
