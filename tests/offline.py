"""Tests never reach the network: the Hugging Face libraries are told, and a socket that tries anyway raises."""

import os
import socket

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"


def _guard(connect):
    def guarded(self, address):
        if self.family != socket.AF_UNIX:
            raise OSError(f"tests are offline: connection to {address!r} refused")
        return connect(self, address)

    return guarded


def block_network() -> None:
    """From here on only Unix sockets connect."""
    socket.socket.connect = _guard(socket.socket.connect)
    socket.socket.connect_ex = _guard(socket.socket.connect_ex)
