"""Keys and values of earlier positions in one block of memory, whose size is fixed when it is made.

Shape suffixes: L layers, B sequences, S new positions, C positions held, M positions there is room for, G KV heads,
d head_dim.
"""

import torch

from dsmoe_ray.model.config import ModelConfig


class ContiguousKvCache:
    """Room for sequences of equal length; the ``KvCache`` of ``model/attention.py`` for one process.

    Positions count as held once the last layer has stored them, so a forward pass that fails in the middle leaves the
    cache as it was.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_len: int,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        attention = config.attention
        # Head-major, so that the keys of one head, which attention reads together, lie together.
        shape = (config.num_layers, batch_size, attention.num_kv_heads, max_len, attention.head_dim)
        self._k_LBGMd = torch.empty(shape, dtype=dtype, device=device)
        self._v_LBGMd = torch.empty(shape, dtype=dtype, device=device)
        self._num_cached = 0

    @property
    def num_cached(self) -> int:
        """Return how many positions of each sequence are held."""
        return self._num_cached

    @property
    def max_len(self) -> int:
        """Return how many positions of each sequence there is room for."""
        return self._k_LBGMd.shape[3]

    @property
    def size_bytes(self) -> int:
        """Return the memory of the cache, filled or not."""
        return self._k_LBGMd.nbytes + self._v_LBGMd.nbytes

    def append(self, layer: int, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values of one layer; return views of all that it holds, ``(B, C, G, d)`` each.

        Raises:
            ValueError: there is no room for them, or they are not of as many sequences as the cache.
        """
        start = self._num_cached
        stop = start + k_BSGd.shape[1]
        if stop > self.max_len:
            raise ValueError(
                f"the KV cache is full: it holds {start} of {self.max_len} positions and was given {stop - start} "
                "more; make it with a larger max_len"
            )
        if len(k_BSGd) != self._k_LBGMd.shape[1]:
            raise ValueError(f"the KV cache is for {self._k_LBGMd.shape[1]} sequences; it was given {len(k_BSGd)}")
        filled = []
        for cached_LBGMd, new_BSGd in ((self._k_LBGMd, k_BSGd), (self._v_LBGMd, v_BSGd)):
            cached_BMGd = cached_LBGMd[layer].transpose(1, 2)
            cached_BMGd[:, start:stop] = new_BSGd
            filled.append(cached_BMGd[:, :stop])
        if layer == len(self._k_LBGMd) - 1:
            self._num_cached = stop
        return filled[0], filled[1]
