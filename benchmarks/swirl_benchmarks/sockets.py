"""Listening sockets, and which hosts are this machine's own."""

import errno
import ipaddress
import socket

from swirl_env.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: a name or address of this machine.
        port: 0 for a free one.

    Raises:
        ConfigError: the port is in use, or cannot be opened.
    """
    listener = None
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("ports are 0 to 65535")  # getaddrinfo takes the rest of a division
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = "is in use" if getattr(error, "errno", 0) == errno.EADDRINUSE else f"cannot be opened ({error})"
        raise ConfigError(f"Port {port} of {host} {reason}. Give another --port, or --port 0 for a free one.") from None
    return listener


def is_loopback(host: str | None) -> bool:
    """Whether a name or address reaches this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
