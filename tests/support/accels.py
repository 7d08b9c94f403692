"""The two ways in which the built-in guest runs."""

from __future__ import annotations

import pytest

KVM = pytest.param("kvm", marks=pytest.mark.kvm)

both_accels = pytest.mark.parametrize("accel", [KVM, "process"])
