"""The machine around a daemon: its service manager, its log, what it can do."""
