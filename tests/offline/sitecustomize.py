"""Refuse connections to other machines in the test process and, through PYTHONPATH, in every Python it starts.

Loopback and Unix sockets work: process groups and notebook kernels need them.
"""

from __future__ import annotations

import ipaddress
import os
import socket


class BlockedNetworkError(OSError):
    """A test tried to reach another machine."""


def is_local(host: object) -> bool:
    """Return whether `host` (a name, an address or None, as `socket` accepts them) is this machine."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False  # resolving a name is a connection too
    return address.is_loopback or address.is_unspecified


def refuse_other_machines(address: object) -> None:
    """Raise `BlockedNetworkError` unless `address`, in any socket family's form, is on this machine."""
    if isinstance(address, tuple) and not is_local(address[0]):
        raise BlockedNetworkError(f"tests run offline, and this one tried to reach {address[0]!r}; give it local data")


def block() -> None:
    """Put the check before every function of `socket` that takes an address; a second call does nothing."""
    if getattr(socket, "other_machines_blocked", False):
        return
    socket.other_machines_blocked = True

    def guarded(original, address_of):
        def call(*args, **kwargs):
            refuse_other_machines(address_of(args, kwargs))
            return original(*args, **kwargs)

        return call

    def last(args, kwargs):  # connect(address), sendto(data, [flags,] address)
        return args[-1]

    socket.socket.connect = guarded(socket.socket.connect, last)
    socket.socket.connect_ex = guarded(socket.socket.connect_ex, last)
    socket.socket.sendto = guarded(socket.socket.sendto, last)
    socket.getaddrinfo = guarded(socket.getaddrinfo, lambda args, kwargs: (args[0] if args else kwargs["host"],))
    socket.gethostbyname = guarded(socket.gethostbyname, lambda args, kwargs: (args[0],))


if os.environ.get("SHOWTELL_OFFLINE"):
    block()
