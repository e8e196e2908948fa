"""QEMU behind the Hypervisor protocol."""
