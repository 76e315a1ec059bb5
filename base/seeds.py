"""Every random draw comes from a seed in the configuration: named streams derived from it, the same on every machine.

rng("views", seed, epoch, sample_id)
"""

import hashlib

import numpy as np


def seed_of(*parts: str | int) -> int:
    """63-bit seed of a stream named by its parts (blake2b: stable over processes, machines and versions)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rng(*parts: str | int) -> np.random.Generator:
    """NumPy generator (Philox) of the named stream."""
    return np.random.Generator(np.random.Philox(seed_of(*parts)))
