"""Authenticated messages: both ends prove that they know the secret, and every message has an HMAC.

    opening    -> name of the protocol, 32 random bytes      <- 32 random bytes, proof        -> proof
    message    length (4 bytes), HMAC-SHA256 over its number and its text (32), its text: fields, each after its length

Proofs and keys are HMACs of the secret over both random numbers, so a message cannot be replayed in another connection,
twice, or in another order. Messages are not encrypted: whoever sees the traffic can read them.
"""

from __future__ import annotations

import hmac
import secrets
import socket

__all__ = ["MOST_BYTES", "Mistrust", "Sealed", "answered", "opened"]

PROTOCOL = b"dtrain members 1"
NONCE = MAC = 32
MOST_BYTES = 1 << 24


class Mistrust(ConnectionError):
    """The other end does not know the secret, does not speak the protocol, or a message was changed on its way."""


class Sealed:
    """An authenticated connection. ``keys``: for sent messages, for received ones."""

    def __init__(self, connection: socket.socket, keys: tuple[bytes, bytes]) -> None:
        self.socket = connection
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0

    def send(self, *fields: bytes) -> None:
        """Send one message. Raises ``ValueError`` if it is too long, and ``OSError``."""
        text = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        if len(text) > MOST_BYTES:
            raise ValueError(f"a message of {len(text)} bytes; at most {MOST_BYTES} are taken")
        self.socket.sendall(len(text).to_bytes(4, "big") + _seal(self._send_key, self._sent, text) + text)
        self._sent += 1

    def receive(self) -> list[bytes]:
        """Receive one message. Raises ``EOFError`` if the other end has closed, ``Mistrust``, and ``OSError``."""
        head = exactly(self.socket, 4 + MAC)
        length = int.from_bytes(head[:4], "big")
        if length > MOST_BYTES:
            raise Mistrust(f"a message says that it has {length} bytes; at most {MOST_BYTES} are taken")
        text = exactly(self.socket, length)
        if not hmac.compare_digest(head[4:], _seal(self._receive_key, self._received, text)):
            raise Mistrust("a message was changed on its way")
        self._received += 1
        return _fields(text)


def opened(connection: socket.socket, secret: bytes) -> Sealed:
    """The handshake of the client. Raises ``Mistrust`` and ``OSError``."""
    nonce = secrets.token_bytes(NONCE)
    connection.sendall(PROTOCOL + nonce)
    try:
        reply = exactly(connection, NONCE + MAC)
    except EOFError as error:
        raise Mistrust("who listens there is no store of `dtrain members` of this version") from error
    both = nonce + reply[:NONCE]
    if not hmac.compare_digest(reply[NONCE:], _derived(secret, b"server", both)):
        raise Mistrust("who listens there has another secret")
    connection.sendall(_derived(secret, b"client", both))
    return Sealed(connection, (_derived(secret, b"up", both), _derived(secret, b"down", both)))


def answered(connection: socket.socket, secret: bytes) -> Sealed:
    """The handshake of the server. Raises ``Mistrust``, ``EOFError`` and ``OSError``."""
    for byte in PROTOCOL:  # any other protocol is refused at its first byte
        if exactly(connection, 1)[0] != byte:
            raise Mistrust("another protocol")
    client_nonce, nonce = exactly(connection, NONCE), secrets.token_bytes(NONCE)
    both = client_nonce + nonce
    connection.sendall(nonce + _derived(secret, b"server", both))
    if not hmac.compare_digest(exactly(connection, MAC), _derived(secret, b"client", both)):
        raise Mistrust("another secret")
    return Sealed(connection, (_derived(secret, b"down", both), _derived(secret, b"up", both)))


def exactly(connection: socket.socket, count: int) -> bytes:
    """Receive exactly ``count`` bytes. Raises ``EOFError`` if the other end closes before, and ``OSError``."""
    received = bytearray()
    while len(received) < count:
        block = connection.recv(min(count - len(received), 1 << 16))
        if not block:
            raise EOFError("the other end has closed the connection")
        received += block
    return bytes(received)


def _fields(text: bytes) -> list[bytes]:
    fields, start = [], 0
    while start < len(text):
        end = start + 4 + int.from_bytes(text[start : start + 4], "big")
        if end > len(text):
            raise Mistrust("a field is longer than its message")
        fields.append(text[start + 4 : end])
        start = end
    return fields


def _seal(key: bytes, number: int, text: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + text, "sha256")


def _derived(secret: bytes, use: bytes, both: bytes) -> bytes:
    return hmac.digest(secret, use + b"\0" + both, "sha256")
