"""The dropout stream: the published test vector of Philox-4x32-10, Triton's numbers, and a fair share of drops."""

import torch

from octavo.kernels.reference.philox import dropout_keep, uniform

# random123's kat_vectors: counter 0, key 0 gives 6627e8d5 as the first word
FIRST_WORD = 0x6627E8D5


def test_known_answer():
    assert uniform(0, torch.tensor([0])).item() == torch.tensor(FIRST_WORD * 4.6566127342e-10, dtype=torch.float32)


def test_offsets_beyond_32_bits_and_large_seeds_have_their_own_numbers():
    offsets = torch.tensor([5, 5 + 2**32, 5 + 2**40])
    numbers = torch.cat([uniform(seed, offsets) for seed in (1, 1 + 2**32)])
    assert numbers.unique().numel() == 6
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_share_of_drops_is_p():
    heads = torch.arange(4)[:, None, None]
    keep = dropout_keep(7, 0.1, heads, torch.arange(100)[:, None], torch.arange(100), 100, 100)
    share = 1 - keep.double().mean()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / keep.numel()) ** 0.5
