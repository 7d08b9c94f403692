"""What both daemons stand on; a module is here only if both reach it."""
