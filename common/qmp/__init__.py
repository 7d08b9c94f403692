"""The control protocol: QMP as QEMU speaks it, and nothing about migration."""
