"""What a server takes on; nothing that takes time is imported, so that the command line can show it at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    batch_size: most images of a batch. patience: seconds that the first of a batch waits for others. most_waiting:
    requests that are read or wait; one more is answered 503 at once. most_bytes, most_pixels: of a picture. top: labels
    of an answer.
    """

    batch_size: int = 32
    patience: float = 0.002
    most_waiting: int = 256
    most_bytes: int = 20_000_000
    most_pixels: int = 50_000_000
    top: int = 5

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("most_waiting", 1), ("most_bytes", 1), ("most_pixels", 1), ("top", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0 <= self.patience <= 10:
            raise ValueError(f"patience must be seconds in [0, 10], got {self.patience!r}")
