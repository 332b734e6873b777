"""What the encoder promises: nothing leaks, order and batch-mates do not matter, merging keeps the right tokens."""

from itertools import pairwise

import pytest
import torch

from affmae_engine.config import ModelConfig
from affmae_engine.model.encoder import Encoder, NormMerging, Stem, survivor_count
from affmae_engine.model.patches import unpatchify
from affmae_engine.model.vit_mae import DropPath
from affmae_kernels.neighbourhoods import build_neighbourhoods


def encode(model, image, visible):
    with torch.no_grad():
        return model.encoder(image, visible)


@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_a_masked_pixel_changes_nothing_bit_for_bit(autoencoder, batch, poison) -> None:
    model = autoencoder()
    image, visible, masked = batch(2, 64, 96)
    hidden = torch.zeros(2, 8 * 12).scatter(1, masked, 1.0)[..., None].expand(-1, -1, 64)
    other = torch.where(unpatchify(hidden, (8, 12), 8) > 0, poison, image)
    for one, two in zip(encode(model, image, visible), encode(model, other, visible), strict=True):
        assert torch.equal(one.feat_BNC, two.feat_BNC) and torch.equal(one.pos_BN2, two.pos_BN2)


def test_a_visible_pixel_does_change_the_output(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, _ = batch(1, 64, 64)
    cell = int(visible[0, 3])
    other = image.clone()
    other[0, 0, cell // 8 * 8 + 7, cell % 8 * 8 + 7] += 1
    assert not torch.equal(encode(model, image, visible)[0].feat_BNC, encode(model, other, visible)[0].feat_BNC)


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_order_of_the_tokens_does_not_matter_bit_for_bit(autoencoder, batch, merging) -> None:
    model = autoencoder(merging=merging)
    image, visible, _ = batch(2, 96, 80)
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in visible])
    for one, two in zip(encode(model, image, visible), encode(model, image, shuffled), strict=True):
        assert torch.equal(one.feat_BNC, two.feat_BNC) and torch.equal(one.pos_BN2, two.pos_BN2)


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_images_do_not_depend_on_their_batch_mates(autoencoder, batch, merging) -> None:
    model = autoencoder(merging=merging)
    image, visible, _ = batch(3, 64, 64)
    together = encode(model, image, visible)
    for i in range(3):
        for one, all_of_them in zip(encode(model, image[i : i + 1], visible[i : i + 1]), together, strict=True):
            assert torch.equal(one.pos_BN2[0], all_of_them.pos_BN2[i])
            torch.testing.assert_close(one.feat_BNC[0], all_of_them.feat_BNC[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_tokens_shrink_and_keep_their_places(autoencoder, batch, merging) -> None:
    model = autoencoder(merging=merging, merge_keep=0.4)
    image, visible, _ = batch(2, 128, 72)
    stages = encode(model, image, visible)
    counts = [stage.pos_BN2.shape[1] for stage in stages]
    assert counts == [72, 28, 11, 4]
    assert [s.feat_BNC.shape[-1] for s in stages] == [32, 64, 96, 96]
    for finer, coarser in pairwise(stages):
        for b in range(2):
            assert {tuple(p) for p in coarser.pos_BN2[b].tolist()} < {tuple(p) for p in finer.pos_BN2[b].tolist()}
    assert {tuple(p) for p in stages[0].pos_BN2[0].tolist()} == {(int(i) % 9, int(i) // 9) for i in visible[0]}


@pytest.mark.parametrize(
    ("tokens", "keep", "expected"),
    [(2048, 0.4, 819), (100, 0.29, 29), (1, 0.4, 1), (2, 0.4, 1), (5, 0.4, 2), (7, 1, 7)],
)
def test_survivor_count(tokens, keep, expected) -> None:
    assert survivor_count(tokens, keep) == expected


def test_scores_receive_a_gradient_through_the_survivors(autoencoder, batch) -> None:
    model = autoencoder()
    image, visible, _ = batch(1, 64, 64)
    model.encoder(image, visible)[-1].feat_BNC.square().sum().backward()
    for stage in model.encoder.stages[:-1]:
        assert stage.merge.score.weight.grad.abs().sum() > 0


def test_norm_merging_marks_the_longest_before_the_last_block() -> None:
    torch.manual_seed(0)
    merge = NormMerging(4, 6, 0.5, "auto")
    pos = torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 0]]], dtype=torch.int32)
    _, near = build_neighbourhoods(pos, (1, 4), cluster_size=8, neighbours=64)
    feat = torch.tensor([[[1.0] * 4, [3.0] * 4, [-2.0] * 4, [0.0] * 4]], requires_grad=True)
    marked, rows = merge.select(feat, near)
    assert rows.tolist() == [[1, 2]]
    torch.testing.assert_close(marked - feat, torch.tensor([0.0, 1, 1, 0])[None, :, None] * merge.mark)
    assert merge(marked, rows).shape == (1, 2, 6)


def test_stem_embeds_a_patch_from_itself_and_three_neighbors() -> None:
    torch.manual_seed(0)
    stem = Stem(2, 16, 8, "auto")
    assert [(c.in_channels, c.out_channels) for c in stem.convs] == [(2, 8), (8, 8), (8, 16)]
    image, every = torch.randn(1, 2, 40, 40), torch.arange(25)[None]
    touched = image.clone()
    touched[:, :, 16:24, 16:24] += 1  # the patch in the middle, cell 12
    changed = (stem(touched, every) - stem(image, every)).abs().sum(-1)[0] > 0
    assert set(torch.nonzero(changed).flatten().tolist()) == {12, 13, 17, 18}


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_other_patch_sizes(patch) -> None:
    torch.manual_seed(0)
    stem = Stem(1, 32, patch, "auto")
    assert len(stem.convs) == patch.bit_length() - 1
    every = torch.arange(6)[None]
    assert stem(torch.randn(1, 1, 3 * patch, 2 * patch), every).shape == (1, 6, 32)


def test_drop_path_rises_linearly() -> None:
    encoder = Encoder(ModelConfig(size="small", drop_path=0.1))
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 15 for i in range(16)])


def test_stochastic_depth_draws_anew_for_every_image_and_only_in_training(autoencoder, batch) -> None:
    model = autoencoder(drop_path=0.9)
    image, visible, _ = batch(1, 32, 32)
    image, visible = image.expand(16, -1, -1, -1), visible.expand(16, -1)

    def distinct() -> list[int]:
        stages = model.encoder(image, visible)
        return [len({tuple(row.tolist()) for row in stage.feat_BNC.detach().flatten(1)}) for stage in stages]

    torch.manual_seed(0)
    assert distinct() == [1, 1, 1, 1]
    model.train()
    first, *_, last = distinct()
    assert first == 1 and last > 1  # the rate of the first block is 0


def test_drop_path_of_a_vit_drops_whole_images() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(400, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped.amax((1, 2)) == dropped.amin((1, 2))).all()
    assert dropped.mean() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(2, 1, 1)), torch.ones(2, 1, 1))
