"""Parked VMs: a VM as a directory, complete or visibly not."""
