"""Plans against a simulation of the blocks, on examples and on anything hypothesis can think of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stg_engine import Plan, Skip, STGConfig
from stg_engine.config import StepGuidance
from stg_engine.plan import Branch, build_plans
from stg_engine.presets import PRESETS


def simulated_block_rows(plan):
    """Run symbolic blocks on every branch and count the distinct computations: what a perfect cache would compute."""
    states = dict.fromkeys((branch.name for branch in plan.branches), ())
    total = 0
    for block in range(plan.num_blocks):
        computed = set()
        for branch in plan.branches:
            mode = branch.skips.get(block)
            if mode == "residual":
                continue
            prompt = branch.prompt if block >= plan.prompt_block else None
            states[branch.name] = (states[branch.name], block, mode, prompt)
            computed.add(states[branch.name])
        total += len(computed)
    return total


@st.composite
def plans(draw):
    num_blocks = draw(st.integers(1, 12))
    layers = st.sets(st.integers(0, num_blocks - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    axes = draw(st.sampled_from([(None,), ("spatial", "temporal")]))
    skip = st.builds(Skip, layers, mode=st.sampled_from(["residual", "attention"]), axis=st.sampled_from(axes))
    weak_pass = draw(st.sampled_from(["prompt", "negative_prompt", "uncond"]))
    skips = draw(st.lists(skip, max_size=1 if weak_pass == "uncond" else 4, unique=True))
    return Plan.build(
        StepGuidance(tuple(skips), weak_pass=weak_pass),
        num_blocks,
        axes=axes,
        uncond=draw(st.booleans()) or (bool(skips) and weak_pass != "prompt"),
        prompt_block=draw(st.integers(-1, num_blocks - 1)),
        shares_attention=draw(st.booleans()),
    )


@given(plans())
def test_block_rows_never_exceed_passes_times_blocks(plan):
    assert plan.num_blocks <= plan.block_rows <= len(plan.branches) * plan.num_blocks
    assert plan.pass_equivalents == plan.block_rows / plan.num_blocks


@given(plans())
def test_block_rows_equal_a_brute_force_count(plan):
    assert plan.block_rows == simulated_block_rows(plan)


@given(plans())
def test_a_branch_forks_exactly_once(plan):
    assert set(plan.forks) == {branch.name for branch in plan.branches} - {"cond"}
    for branch in plan.branches:
        fork = plan.forks.get(branch.name)
        first = 0 if fork is None else fork.block
        for block in range(plan.num_blocks):
            passed_through = branch.skips.get(block) == "residual"
            assert (branch.name in plan.rows[block]) == (block >= first and not passed_through)


@given(plans())
def test_every_branch_is_drawn_with_a_mark_per_range(plan):
    lines = str(plan).splitlines()
    ranges = lines[0].split()[1:]
    assert [line.split()[0] for line in lines[1 : len(plan.branches) + 1]] == [branch.name for branch in plan.branches]
    labels = [f"{layer}{(axis or '')[:1]}" for layer in range(plan.num_blocks // len(plan.axes)) for axis in plan.axes]
    blocks = [range(labels.index(r.split("-")[0]), labels.index(r.split("-")[-1]) + 1) for r in ranges]
    assert [block for covered in blocks for block in covered] == list(range(plan.num_blocks))
    counts = lines[len(plan.branches) + 1].split()[1:]
    assert sum(int(n) * len(covered) for n, covered in zip(counts, blocks, strict=True)) == plan.block_rows


def test_ltx_video_2b():
    plan = Plan.build(STGConfig.preset("ltx-video-2b"), 28)
    assert (plan.block_rows, round(plan.pass_equivalents, 2)) == (64, 2.29)
    assert (
        str(plan)
        == """\
blocks  0  1-18  19  20-27
uncond  +  #     #   #      forks from cond in block 0: its prompt enters
cond    #  #     #   #
skip    .  .     o   #      forks from cond in block 19: residual skip of 19
rows    2  2     2   3

# rows of its own
. equal to another branch, no rows
+ rows of its own, self-attention shared
o passes through (residual skip), no rows

64 of 84 block-rows: 2.29 pass-equivalents instead of 3.00 (1.31x)"""
    )


@pytest.mark.parametrize(
    ("num_blocks", "skip", "uncond", "block_rows"),
    [
        (48, Skip((34,)), True, 109),  # Mochi
        (42, Skip((11,)), True, 114),  # CogVideoX-5B
        (30, Skip((3, 8, 16)), True, 84),  # Wan 2.1 1.3B
        (60, Skip((2,)), False, 117),  # HunyuanVideo
        (28, Skip((19,), mode="attention"), True, 65),
    ],
)
def test_published_settings(num_blocks, skip, uncond, block_rows):
    assert Plan.build(StepGuidance((skip,)), num_blocks, uncond=uncond).block_rows == block_rows


def test_ltx_video_13b_first_pass():
    """27 steps in bins 0, 1 1, 2 2, 3 x5, 4 x4, 5 x5, 6 x8; an attention skip keeps its row in the skipped block."""
    plans = build_plans(STGConfig.preset("ltx-video-13b"), 48)
    steps = [1, 2, 2, 5, 4, 5, 8]
    assert sum(n * len(plan.branches) for n, plan in zip(steps, plans, strict=True)) == 62
    cfg_from_22, cfg_from_28, no_cfg_from_28 = 2 * 48 + 26, 2 * 48 + 20, 48 + 20
    expected = 3 * 48 + 2 * cfg_from_22 + 9 * cfg_from_28 + 13 * no_cfg_from_28
    assert sum(n * plan.block_rows for n, plan in zip(steps, plans, strict=True)) == expected


def test_weak_pass_on_the_negative_prompt_shares_with_uncond():
    plan = Plan.build(STGConfig(layers=(8,), weak_pass="negative_prompt"), 30)
    assert [branch.prompt for branch in plan.branches] == ["uncond", "cond", "uncond"]
    assert plan.forks["skip"].parent == "uncond"
    assert plan.block_rows == 81 == simulated_block_rows(plan)
    assert "skip    .  .    o  #     forks from uncond in block 8: residual skip of 8" in str(plan)


def test_weak_uncond_is_no_further_branch():
    plan = Plan.build(STGConfig(layers=(8,), weak_pass="uncond"), 30)
    assert [branch.name for branch in plan.branches] == ["uncond", "cond"]
    assert plan.block_rows == 59 == simulated_block_rows(plan)
    assert "uncond  +  #    o  #     forks from cond in block 0: its prompt enters, residual skip of 8" in str(plan)
    strong = Plan.build(STGConfig(layers=(8,), weak_pass="uncond", scale=0.0), 30)
    assert strong.block_rows == 60


def test_weak_pass_needs_uncond():
    for weak_pass in ("negative_prompt", "uncond"):
        with pytest.raises(ValueError, match=f"weak_pass='{weak_pass}' acts through CFG, which is off"):
            Plan.build(STGConfig(layers=(8,), weak_pass=weak_pass), 30, uncond=False)
        assert Plan.build(STGConfig(layers=(8,), weak_pass=weak_pass, scale=0.0), 30, uncond=False).block_rows == 30


def test_skip_at_scale_0_has_no_branch():
    config = STGConfig(layers=(1,), scale=0.0, extra_skips=(Skip((2,), 1.0),))
    assert [branch.name for branch in Plan.build(config, 4).branches] == ["uncond", "cond", "skip"]


def test_errors():
    with pytest.raises(ValueError, match=r"layers=\(28,\) is not allowed: the model has 28 blocks, 0 to 27"):
        Plan.build(STGConfig(layers=(28,)), 28)
    with pytest.raises(ValueError, match="a plan per entry"):
        Plan.build(PRESETS["ltx-video-13b"].config, 48)
    with pytest.raises(ValueError, match="schedule=None"):
        build_plans(STGConfig(layers=(1,)), 48)
    with pytest.raises(ValueError, match="never differ"):
        _ = Plan((Branch("cond"), Branch("skip")), 4).forks


def test_plans_draw_equal_pictures_once():
    text = str(build_plans(STGConfig.preset("ltx-video-13b"), 48))
    assert text.count("sigma ") == 7
    assert text.count("blocks  ") == 4


def test_a_plan_that_shares_nothing():
    plan = Plan.build(STGConfig(layers=(19,)), 28, is_shared=False)
    assert plan.block_rows == 3 * 28 - 1  # a residual skip's row passes block 19 by
    assert all(names == ("uncond", "cond", "skip") for block, names in enumerate(plan.rows) if block != 19)
    assert not any(plan.shared_attention(block) for block in range(28))
    assert str(plan).count("shares nothing") == 2
