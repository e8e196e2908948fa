"""The device ``nowhere``: a TUN interface with default routes that receives all packets past the proxy.

Its other end is the guest's network process, which answers the packets (see ``packets``). The kernel is
configured to send nothing of its own on it. Sources: netdevice(7), rtnetlink's ioctls in route.h and ipv6.h,
Documentation/networking/tuntap.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct

NAME = "nowhere"
ADDRESS = "192.0.0.8"  # the dummy address of a host without one (RFC 7600)
ADDRESS_6 = "fd6d:6963:726f:766d::1"
RESOLVER = "192.0.0.53"  # routed to the device like any other address, so that lookups fail at once
MTU = 1500
_RESOLV_CONF = "/etc/resolv.conf"

_TUNSETIFF = 0x400454CA
_SIOCADDRT = 0x890B
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_IFF_TUN_NO_PI = 0x1001
_IFF_UP, _IFF_MULTICAST = 0x1, 0x1000
_RTF_UP = 1
_METRIC = 1024  # that of a default route added by a user
_IFREQ = struct.Struct("16s24s")
_QUIET = {
    "accept_dad": "0", "accept_ra": "0", "addr_gen_mode": "1", "autoconf": "0", "dad_transmits": "0",
    "router_solicitations": "0", "use_tempaddr": "0",
}  # fmt: skip


def open_device() -> int | None:
    """Create the device and return its descriptor; ``None`` if the kernel has no TUN devices."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _request(struct.pack("H", _IFF_TUN_NO_PI)))
        _lead_here()
    except OSError:
        os.close(fd)
        return None
    with contextlib.suppress(OSError):  # a kernel without IPv6 needs no route for it
        _lead_here_6()
    return fd


def name_resolver() -> None:
    """Configure a name server behind the device, unless the image configures one outside the machine.

    Without one, or with one that does not run, lookups would fail too, but unreported.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError), open(_RESOLV_CONF) as file:
        words = [line.split() for line in file]
        known = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
        if any(not address.startswith("127.") and address != "::1" for address in known):
            return
    with contextlib.suppress(OSError):
        if os.path.islink(_RESOLV_CONF):  # to a file of a daemon that does not run
            os.unlink(_RESOLV_CONF)
        with open(_RESOLV_CONF, "w") as file:
            file.write(f"nameserver {RESOLVER}\n")


def _lead_here() -> None:
    for key, value in _QUIET.items():
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{NAME}/{key}", "w") as file:
            file.write(value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, _request(b"")), 16)[0]
        fcntl.ioctl(control, _SIOCSIFADDR, _request(_address(ADDRESS)))
        fcntl.ioctl(control, _SIOCSIFNETMASK, _request(_address("255.255.255.255")))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _request(struct.pack("H", flags & ~_IFF_MULTICAST | _IFF_UP)))
        fcntl.ioctl(control, _SIOCADDRT, _route())


def _lead_here_6() -> None:
    index = socket.if_nametoindex(NAME)
    own = socket.inet_pton(socket.AF_INET6, ADDRESS_6)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16sIi", own, 128, index))
        # struct in6_rtmsg: destination, source, gateway, type, lengths, metric, info, flags, device
        route = struct.pack("16s16s16sIHHILIi", b"", b"", b"", 0, 0, 0, _METRIC, 0, _RTF_UP, index)
        fcntl.ioctl(control, _SIOCADDRT, route)


def _request(value: bytes) -> bytes:
    return _IFREQ.pack(NAME.encode(), value)


def _address(text: str) -> bytes:
    return struct.pack("HH4s8s", socket.AF_INET, 0, socket.inet_aton(text), b"")


def _route() -> bytes:
    """Return a struct rtentry: the default route, by this device."""
    name = _route_device.buffer_info()[0]
    everything = _address("0.0.0.0")  # noqa: S104 - a route, not a listener
    return struct.pack(
        "L16s16s16sHhLPhPLLH", 0, everything, _address("0.0.0.0"), everything,  # noqa: S104 - a route
        _RTF_UP, 0, 0, 0, 0, name, 0, 0, 0,
    )  # fmt: skip


_route_device = array.array("b", NAME.encode() + b"\0")
