"""Attention on stacks: one op for all ranks, with the bits of each rank's own."""

import pytest
import torch
import torch.nn.functional as F

import localtensor_compile as lt
from tests.test_stacked_graphs import nodes_of

W, BATCH, HEADS, ROWS, WIDTH = 3, 2, 2, 5, 8


def inputs():
    def make(rank, seed):
        generator = torch.Generator().manual_seed(10 * rank + seed)
        return torch.randn(BATCH, ROWS, HEADS, WIDTH, generator=generator).transpose(1, 2)

    return [lt.rank_map(lambda r, seed=seed: make(r, seed)).requires_grad_() for seed in range(3)]


def masks():
    def make(*size):
        draw = lambda r: torch.randn(size, generator=torch.Generator().manual_seed(r))
        return lt.rank_map(draw)

    with lt.maybe_disable_local_tensor_mode():
        plain = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(7))
    return {
        "none": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "two_dimensions": {"attn_mask": make(ROWS, ROWS)},
        "a_mask_for_all": {"attn_mask": make(1, 1, ROWS, ROWS)},
        "batch": {"attn_mask": make(BATCH, HEADS, ROWS, ROWS)},
        "bool": {"attn_mask": make(ROWS, ROWS) > -1},
        "plain": {"attn_mask": plain},
    }


def run(layout, name, backend):
    torch._dynamo.reset()
    with lt.LocalTensorMode(W, layout=layout) as mode:
        q, k, v = inputs()
        options = masks()[name]
        before = mode.stats()["per_rank"]

        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)

        call = attend if backend is None else torch.compile(attend, fullgraph=True, backend=backend)
        out = call(q, k, v)
        out.backward(torch.ones_like(out) * 0.5)
        results = [out.detach(), q.grad, k.grad, v.grad]
        assert layout == "per_rank" or mode.stats()["per_rank"] == before
        return [dict(t._local_tensors.items()) for t in results]


NAMES = ("none", "causal", "scale", "two_dimensions", "a_mask_for_all", "batch", "bool", "plain")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_each_rank(name, backend):
    found, expected = run("stacked", name, backend), run("per_rank", name, None)
    for mine, theirs in zip(found, expected):
        for r in range(W):
            assert torch.equal(mine[r], theirs[r])
            assert mine[r].stride() == theirs[r].stride()


def test_nodes_do_not_grow():
    counted = []
    for ranks in (2, 9):
        with lt.LocalTensorMode(ranks, layout="stacked"):
            q, k, v = inputs()

            def step(q, k, v):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum()

            counted.append(nodes_of(step, q, k, v))
    assert counted[0] == counted[1]
