"""Loaded by every Python process of a test run: kernels, workers, programs that tests start.

Python imports a module of this name by itself at its start; `tests/conftest.py` puts this folder
on PYTHONPATH. Two rules come with it.

- No network. A connection to any other machine, and a question to a name server, is refused, as on
  a computer that is offline. It is also noted in the file named by MANY_HANDS_REFUSED, so that a
  program that hides the refusal is found out.
- A warning that comes from a module of `helpers` is an error.
"""

import errno
import ipaddress
import os
import socket
import sys
import warnings

allowed = False  # True for tests that are marked `network`


def is_here(host):
    """True when a host name or address means this machine."""
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if not host or host in ("localhost", "localhost.localdomain", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _is_number(host):
    try:
        ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return True


def _note(event, host):
    path = os.environ.get("MANY_HANDS_REFUSED")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{event} {host}\n")


def _refuse(event, arguments):
    if allowed or event not in _HOST:
        return
    host = _HOST[event](arguments)
    lookup = event.startswith("socket.get")
    # To write an address given as a number in another form asks nobody.
    if is_here(host) or (lookup and _is_number(host)):
        return
    _note(event, host)
    sentence = f"the tests run without a network: {host} was not asked"
    if lookup:
        raise socket.gaierror(socket.EAI_AGAIN, sentence)
    raise OSError(errno.ENETUNREACH, sentence)


def _host_of_socket(arguments):
    # An address of another family (a Unix socket) is a path of this machine: no host.
    sock, address = arguments[:2]
    return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) and address else None


_HOST = {
    "socket.connect": _host_of_socket,
    "socket.sendto": _host_of_socket,
    "socket.sendmsg": _host_of_socket,
    "socket.getaddrinfo": lambda arguments: arguments[0],
    "socket.gethostbyname": lambda arguments: arguments[0],
}

sys.addaudithook(_refuse)
warnings.filterwarnings("error", module=r"helpers(\.|$)")
