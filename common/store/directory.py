"""A parked VM is a directory; `manifest.json` comes last and makes it one.

    Parking   one that is being filled, by one process at a time
    Parked    a complete one: nothing of it changes any more but the last three

Besides the files that the manifest lists there may be

    receiving    until it is complete: what has come, a JSON object a line
    kept-NAME    until it is complete: what a restarted daemon needs
    running      the VM runs elsewhere; serving it a second time takes a clone
    working-set  what an earlier destination asked for first
    description.json   what else is known of it

A crash at any moment leaves `receiving` and no manifest, or a manifest whose
files are all on the disk.
"""

from common.store.parked import Parked
from common.store.parking import Parking

__all__ = ["Parked", "Parking"]
