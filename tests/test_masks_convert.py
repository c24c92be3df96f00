"""Masks from and to other libraries; FlexAttention's mask functions as a second, external definition of what they mean."""

from __future__ import annotations

import math

import pytest
import torch
from mask_cases import expressions
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

import fastattn
from fastattn import masks
from fastattn.masks import from_dense

# Patterns of attention-gym's catalogue, each as a mask_mod written for FlexAttention and as an expression of ours.
L = 256
IDS = torch.tensor([0] * 50 + [1] * 100 + [2] * 3 + [3] * 103)
IMAGES = torch.tensor([-1] * 40 + [0] * 60 + [-1] * 20 + [1] * 90 + [-1] * 46)
PARENTS = torch.tensor([-1, *[max(0, n - 1 - n % 5) for n in range(1, L)]])
TILES = masks.neighborhood((4, 4), 3)  # 16 tiles of 16 tokens
BLOCKS = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3
LEFT_PADDED = torch.arange(L) >= torch.tensor([[0], [100], [31]])
ANCESTORS = torch.eye(L, dtype=torch.bool)
for _node in range(1, L):
    ANCESTORS[_node] |= ANCESTORS[PARENTS[_node]]
half, block = L // 2, 16  # block diffusion: noisy tokens, then clean ones


def natten(b, h, q, k, height=16, width=16, kernel=5):
    seen = []
    for q_at, k_at, size in ((q // width, k // width, height), (q % width, k % width, width)):
        centre = q_at.clamp(kernel // 2, size - 1 - kernel // 2)
        seen.append((centre - k_at).abs() <= kernel // 2)
    return seen[0] & seen[1]


def block_diffusion(b, h, q, k):
    q_clean, k_clean, q_block, k_block = q >= half, k >= half, q % half // block, k % half // block
    same = (q_block == k_block) & (q_clean == k_clean)
    return same | (~q_clean & k_clean & (q_block > k_block)) | (q_clean & k_clean & (q_block >= k_block))


def block_diffusion_mask():
    n = half // block
    own, before = torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool).tril(-1)
    rows = [torch.cat((own, before), 1), torch.cat((torch.zeros_like(own), own | before), 1)]
    return masks.blocks(torch.cat(rows), block)


FLEX = {  # name: (mask, mask_mod, Lq, Lk)
    "causal": (masks.causal(), lambda b, h, q, k: q >= k, L, L),
    "causal of a decoding step": (masks.causal(), lambda b, h, q, k: q + 156 >= k, 100, L),
    "causal top-left": (masks.causal("top_left"), lambda b, h, q, k: q >= k, 100, L),
    "sliding window": (masks.causal() & masks.window(30, None), lambda b, h, q, k: (q >= k) & (q - k <= 30), L, L),
    "prefix LM": (masks.causal() | masks.prefix(70), lambda b, h, q, k: (q >= k) | (k < 70), L, L),
    "attention sink": (
        masks.causal() & (masks.window(32, None) | masks.prefix(4)),
        lambda b, h, q, k: (q >= k) & ((q - k <= 32) | (k < 4)), L, L,
    ),
    "documents": (masks.documents(IDS), lambda b, h, q, k: IDS[q] == IDS[k], L, L),
    "causal documents": (
        masks.causal() & masks.documents(IDS), lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k), L, L,
    ),
    "shared prefix": (
        masks.causal() & (masks.documents(IDS) | masks.prefix(50)),
        lambda b, h, q, k: (q >= k) & ((IDS[q] == IDS[k]) | (k < 50)), L, L,
    ),
    "dilated window": (
        masks.dilated(4, 60), lambda b, h, q, k: ((q - k).abs() <= 60) & ((q - k) % 4 == 0), L, L,
    ),
    "strided": (
        masks.strided(16) & masks.causal(), lambda b, h, q, k: (q >= k) & ((q - k <= 16) | ((q - k) % 16 == 0)), L, L,
    ),
    "longformer": (
        masks.longformer(20, [0, 1, 100]),
        lambda b, h, q, k: ((q - k).abs() <= 20) | (q < 2) | (k < 2) | (q == 100) | (k == 100), L, L,
    ),
    "2-D neighbourhood": (masks.neighborhood((16, 16), 5), natten, L, L),
    "sliding tiles": (
        masks.blocks(TILES.to_dense(16, 16)[0, 0], 16),
        lambda b, h, q, k: natten(b, h, q // 16, k // 16, 4, 4, 3), L, L,
    ),
    "transfusion": (
        masks.causal() | (masks.documents(IMAGES) & ~masks.key_padding(IMAGES < 0)),
        lambda b, h, q, k: (q >= k) | ((IMAGES[q] == IMAGES[k]) & (IMAGES[k] >= 0)), L, L,
    ),
    "cross attention": (
        masks.documents(IDS, IMAGES[:200]), lambda b, h, q, k: IDS[q] == IMAGES[k], L, 200,
    ),
    "block diffusion": (block_diffusion_mask(), block_diffusion, L, L),
    "tree of drafts": (
        masks.tree(PARENTS, context=44),
        lambda b, h, q, k: (k < 44) | ANCESTORS[q, (k - 44).clamp(min=0)], L, L + 44,
    ),
    "block-sparse per head": (
        masks.blocks(BLOCKS, 16), lambda b, h, q, k: BLOCKS[b, h, q // 16, k // 16], L, L,
    ),
    "left padding": (
        masks.causal() & masks.key_padding(LEFT_PADDED), lambda b, h, q, k: LEFT_PADDED[b, k] & (q >= k), L, L,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEX)
def test_flex_agrees_on_the_meaning(name):
    mask, mask_mod, Lq, Lk = FLEX[name]
    expected = create_mask(mask_mod, *mask.shape, Lq, Lk, device="cpu")
    assert torch.equal(mask.to_dense(Lq, Lk), expected.expand(*mask.shape, Lq, Lk))
    assert torch.equal(mask.plan(Lq, Lk).to_dense(), expected.expand(*mask.shape, Lq, Lk))


@pytest.mark.parametrize("name", FLEX)
def test_from_flex(name):
    mask, mask_mod, Lq, Lk = FLEX[name]
    B, H = (n if n > 1 else None for n in mask.shape)
    converted = masks.from_flex(create_block_mask(mask_mod, B, H, Lq, Lk, device="cpu", BLOCK_SIZE=64))
    assert torch.equal(converted.to_dense(Lq, Lk).expand(*mask.shape, Lq, Lk), mask.to_dense(Lq, Lk))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", FLEX)
def test_to_flex(name, block_size):
    """The same pairs by mask_mod, and the block lists that create_block_mask makes of it."""
    mask, _, Lq, Lk = FLEX[name]
    block_mask = mask.to_flex(Lq, Lk, block_size)
    assert torch.equal(create_mask(block_mask.mask_mod, *mask.shape, Lq, Lk, device="cpu"), mask.to_dense(Lq, Lk))
    assert torch.equal(block_mask.to_dense(), listed(mask, Lq, Lk, block_size).to_dense())
    assert masks.from_flex(block_mask).density(Lq, Lk) == pytest.approx(mask.density(Lq, Lk))


def listed(mask, Lq, Lk, block_size) -> BlockMask:
    dense = mask.to_dense(Lq, Lk)
    return create_block_mask(lambda b, h, q, k: dense[b, h, q, k], *mask.shape, Lq, Lk, "cpu", block_size)


def test_full_and_partial_blocks_are_told_apart():
    block_mask = masks.causal().to_flex(300, 300, 64)
    own = listed(masks.causal(), 300, 300, 64)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(block_mask, name), getattr(own, name)), name
    assert block_mask.seq_lengths == (300, 300)
    assert masks.from_flex(block_mask) == masks.causal()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_on_it():
    mask = masks.causal() & masks.documents(IDS)
    q, k, v = (torch.randn(2, 3, L, 16) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=mask.to_flex(L, L))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense(L, L))
    torch.testing.assert_close(out, expected)


def test_block_lists_without_a_mask_mod_are_taken_as_they_are():
    """FlexAttention in eager mode would see everything here; its compiled kernel, and we, read the lists."""
    count, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    mask = masks.from_flex(BlockMask.from_kv_blocks(count.int(), indices.int(), BLOCK_SIZE=64))
    assert mask == masks.blocks(torch.tensor([[False, True], [True, True]]), 64)


def test_to_flex_refuses():
    with pytest.raises(ValueError, match="multiple of 64"):
        masks.causal().to_flex(100, 100, 100)
    nobody = masks.documents(torch.zeros(0, 4, dtype=torch.int64))
    for mask, Lq, Lk in ((masks.full(), 0, 5), (masks.full(), 3, 0), (nobody, 4, 4)):
        with pytest.raises(ValueError, match=f"BlockMask needs pairs.*{Lq} x {Lk}"):
            mask.to_flex(Lq, Lk)
    with pytest.raises(TypeError, match="BlockMask"):
        masks.from_flex(torch.ones(3, 3))
    for block in (2, -1):
        count, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[block, 0], [0, 1]]]])
        with pytest.raises(ValueError, match=f"kv_indices of the BlockMask lists block {block}, there are 2"):
            masks.from_flex(BlockMask.from_kv_blocks(count.int(), indices.int(), BLOCK_SIZE=64, compute_q_blocks=False))


CAUSAL, IDS_70 = masks.causal(), torch.arange(300) // 70
STRUCTURES = {
    "full": masks.full(),
    "empty": masks.empty(),
    "causal": masks.causal(),
    "window": masks.window(20, 5),
    "key padding": masks.key_padding(torch.tensor([200, 300, 0])),
    "documents": masks.documents(IDS_70),
    "causal & documents": CAUSAL & masks.documents(IDS_70),
    "causal or prefix": CAUSAL | masks.prefix(torch.tensor([30, 0])),
    "causal & key padding": CAUSAL & masks.key_padding(torch.arange(300) >= torch.tensor([[0], [33], [250]])),
    "window & key padding": masks.window(9, 9) & masks.key_padding(torch.tensor([300, 123])),
    "blocks of 64": masks.blocks(torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5) < 0.4), 64),
    "blocks of 16": masks.bigbird(16),
    "intervals": masks.longformer(8, [0, 5]),
    "dense": masks.tree([-1, *[max(0, n - 2) for n in range(299)]]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_from_dense_finds(structure):
    mask = STRUCTURES[structure]
    visible = mask.to_dense(300, 300)
    found, report = from_dense(visible)
    assert report.structure == structure
    assert report.density == pytest.approx(mask.density(300, 300)) and structure in str(report)
    assert torch.equal(found.to_dense(300, 300).expand_as(visible), visible)
    assert (report.intervals_per_row is None) == (structure == "dense")


def test_from_dense_names():
    """The names are the expressions that were written."""
    for mask in (
        masks.full(),
        masks.causal(),
        masks.window(20, 5),
        CAUSAL | masks.prefix(30),
        STRUCTURES["blocks of 64"],
    ):
        assert from_dense(mask.to_dense(300, 300))[0] == mask
    assert from_dense(masks.causal("top_left").to_dense(300, 200))[0] == masks.causal("top_left")
    assert from_dense(torch.ones(2, 3, 1, 9, dtype=torch.bool))[0] == masks.full()


@pytest.mark.parametrize("part", range(4))
def test_from_dense_is_exact(part):
    for _, dense, Lq, Lk in expressions(25, seed=200 + part):
        found, report = from_dense(dense)
        assert torch.equal(found.to_dense(Lq, Lk).expand_as(dense), dense)
        assert report.density == pytest.approx(dense.double().mean().item(), abs=1e-12)


def test_from_dense_of_an_expanded_tensor_reads_it_once():
    visible = (torch.rand(1, 1, 100, 100) < 0.5).expand(8, 4, -1, -1)
    found, _ = from_dense(visible)
    assert found.shape == (1, 1) and torch.equal(found.to_dense(100, 100), visible[:1, :1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3, 3)])
def test_from_dense_of_nothing(shape):
    found, report = from_dense(torch.ones(shape, dtype=torch.bool))
    assert report.density == 0.0 and found.to_dense(*shape[-2:]).numel() == 0


def test_causal_biases():
    assert masks.from_causal_bias(causal_lower_right(5, 9)) == masks.causal()
    assert masks.from_causal_bias(causal_upper_left(5, 9)) == masks.causal("top_left")
    for bias in (causal_lower_right(5, 9), causal_upper_left(5, 9)):
        dense = (
            bias._materialize("cpu") if bias._materialize("cpu").dtype == torch.bool else bias._materialize("cpu") == 0
        )
        assert torch.equal(masks.from_causal_bias(bias).to_dense(5, 9)[0, 0], dense)
    with pytest.raises(TypeError, match="CausalBias"):
        masks.from_causal_bias(torch.ones(3, 3))


@pytest.mark.parametrize("bias_of", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("Lq, Lk", [(8, 12), (12, 12)])
def test_causal_biases_as_arguments(bias_of, Lq, Lk):
    """Such a bias is a tensor whose memory was never written: nothing may read it."""
    q, k, bias = torch.randn(1, 2, Lq, 16), torch.randn(1, 2, Lk, 16), bias_of(Lq, Lk)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=bias)
    outs = [fastattn.scaled_dot_product_attention(q, k, k, bias)]
    with fastattn.patched():
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=bias))
    for out in outs:
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, expected)
    for name in ("mask", "bias"):
        with pytest.raises(TypeError, match=f"{name} is .*CausalBias.*from_causal_bias"):
            fastattn.attention(q, k, k, **{name: bias})
    with pytest.raises(RuntimeError, match="CausalBias of 5 x 12"):
        fastattn.scaled_dot_product_attention(q, k, k, bias_of(5, 12))


@pytest.mark.parametrize("mask", [masks.causal(), masks.causal().plan(8, 8)], ids=["mask", "plan"])
def test_the_drop_in_says_where_masks_go(mask):
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(TypeError, match=r"fastattn\.attention\(mask="):
        fastattn.scaled_dot_product_attention(q, q, q, mask)


def test_flash_arguments():
    assert masks.from_flash() == masks.full()
    assert masks.from_flash(causal=True) == masks.causal()
    assert masks.from_flash(window_size=(5, 0)) == masks.window(5, 0)
    assert masks.from_flash(causal=True, window_size=(5, -1)) == masks.causal() & masks.window(5, None)
    cu_q, cu_k = torch.tensor([0, 3, 3, 10], dtype=torch.int32), torch.tensor([0, 5, 6, 20], dtype=torch.int32)
    packed = masks.from_flash(True, (2, -1), cu_q, cu_k)
    assert packed == masks.from_cu_seqlens(cu_q, cu_k, causal=True, window=(2, None))
    i, j = torch.arange(3)[:, None], torch.arange(5)
    assert torch.equal(packed.to_dense(10, 20)[0, 0, :3, :5], (j <= i + 2) & (j >= i))
    for wrong in ({"window_size": (-2, 0)}, {"cu_seqlens_k": cu_k}):
        with pytest.raises(ValueError):
            masks.from_flash(**wrong)
    for wrong in ({"window_size": 5}, {"causal": "top_left"}):
        with pytest.raises(TypeError):
            masks.from_flash(**wrong)


def test_padding_masks():
    tokens = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    expected = tokens.bool()[:, None, None].expand(-1, 1, 3, -1)
    for mask in (tokens, tokens.bool(), tokens.float(), tokens.to(torch.int8)):
        assert torch.equal(masks.from_padding_mask(mask).to_dense(3, 4), expected)
    for wrong in (tokens * 2, (1 - tokens) * -math.inf, tokens[0], tokens[:, None, None]):
        with pytest.raises(ValueError):
            masks.from_padding_mask(wrong)
