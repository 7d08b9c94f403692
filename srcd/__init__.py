"""The source daemon: moves a running guest away from this host."""
