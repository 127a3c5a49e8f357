"""What is kept from step to step is found again, and dropped when its inputs change."""

import pytest
import torch
from engine.tiny import tiny_inputs, tiny_transformer
from peft import LoraConfig

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.memo import Memo, fingerprint
from stg_engine.reference import passes_one_by_one

CONFIG = STGConfig(layers=(1,))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.fixture
def calls(transformer):
    """Calls of a cross-attention's key projection and of the caption projection."""
    counts = {}
    for path in ("transformer_blocks.3.attn2.to_k", "caption_projection", "transformer_blocks.3.attn1.to_k"):
        counts[path] = 0
        module = transformer.get_submodule(path)
        inner = module.forward  # below the engine's hook, which a module's own forward hooks are not

        def counted(*args, inner=inner, path=path):
            counts[path] += 1
            return inner(*args)

        module.forward = counted
    return counts


def assert_right(transformer, denoiser, inputs):
    actual = denoiser.branches(*inputs)
    denoiser.detach()
    expected = passes_one_by_one(transformer, CONFIG.skips, *inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_prompt_is_projected_once(transformer, calls, execution):
    shared, cond, uncond = tiny_inputs()
    rows = 3 if execution == "serial" else 1
    with Denoiser(transformer, CONFIG, execution=execution) as denoiser:
        for step in range(3):
            denoiser.branches({**shared, "timestep": shared["timestep"] - step}, cond, uncond)
        assert calls["transformer_blocks.3.attn2.to_k"] == rows
        assert calls["caption_projection"] == rows
        assert calls["transformer_blocks.3.attn1.to_k"] == 3 * rows
        denoiser.release()
        denoiser.branches(shared, cond, uncond)
        assert calls["transformer_blocks.3.attn2.to_k"] == 2 * rows


def test_views_of_one_prompt_are_found_again(transformer, calls):
    shared, cond, uncond = tiny_inputs()
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
    with Denoiser(transformer, CONFIG) as denoiser:
        for _ in range(3):
            denoiser.branches(shared, *({k: v[rows] for k, v in both.items()} for rows in (slice(1, 2), slice(0, 1))))
        assert calls["caption_projection"] == 1


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_another_prompt_is_noticed(transformer, calls, change):
    shared, cond, uncond = tiny_inputs()
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches(shared, cond, uncond)
    if change == "written":
        cond["encoder_hidden_states"].mul_(2)
    else:
        cond["encoder_hidden_states"] = cond["encoder_hidden_states"] * 2
    assert_right(transformer, denoiser, (shared, cond, uncond))
    assert calls["caption_projection"] > 1


@pytest.mark.parametrize("before", [True, False], ids=["adapter_before", "adapter_after"])
@pytest.mark.parametrize("change", ["add", "scale", "switch_off", "delete", "fuse"])
def test_adapters_are_noticed(transformer, change, before):
    inputs = tiny_inputs()
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["attn2.to_k", "attn2.to_v", "to_q"])
    if before:
        transformer.add_adapter(lora, "first")
    denoiser = Denoiser(transformer, CONFIG)
    if not before:
        transformer.add_adapter(lora, "first")
    untouched = denoiser.branches(*inputs)["cond"]
    if change == "add":
        transformer.add_adapter(lora, "second")
        transformer.set_adapters(["first", "second"])
    elif change == "scale":
        transformer.set_adapters(["first"], [0.25])
    elif change == "switch_off":
        transformer.disable_adapters()
    elif change == "delete":
        transformer.delete_adapters("first")
    else:
        transformer.fuse_lora(lora_scale=0.5)
    assert not torch.equal(denoiser.branches(*inputs)["cond"], untouched)
    assert_right(transformer, denoiser, inputs)


EVERY_LINEAR = ["proj_in", "proj_out", "linear", "linear_1", "linear_2", "to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]


@pytest.mark.parametrize("before", [True, False], ids=["adapter_before", "adapter_after"])
@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_an_adapter_on_every_linear(transformer, before, execution):
    inputs = tiny_inputs(2, per_token=True)
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=EVERY_LINEAR)
    if before:
        transformer.add_adapter(lora)
    denoiser = Denoiser(transformer, CONFIG, execution=execution)
    if not before:
        transformer.add_adapter(lora)
    denoiser.branches(*inputs)
    assert_right(transformer, denoiser, inputs)


def test_weights_written_in_place_are_noticed(transformer):
    inputs = tiny_inputs()
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches(*inputs)
    transformer.transformer_blocks[3].attn2.to_k.weight.mul_(2)
    assert_right(transformer, denoiser, inputs)


def test_weights_swapped_through_data_are_noticed(transformer):
    inputs = tiny_inputs()
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches(*inputs)
    weight = transformer.transformer_blocks[3].attn2.to_k.weight
    weight.data = weight.data * 2
    assert_right(transformer, denoiser, inputs)


def test_autocast_is_noticed(transformer):
    inputs = tiny_inputs()
    denoiser = Denoiser(transformer, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        denoiser.branches(*inputs)
    assert_right(transformer, denoiser, inputs)


@pytest.mark.parametrize("field", ["active_adapters", "merged_adapters", "scaling", "disable_adapters"])
def test_fingerprint_sees_each_state_of_an_adapter(field):
    module = torch.nn.Linear(2, 2)
    outer = torch.nn.Sequential(module)
    before = fingerprint([outer])
    values = {"scaling": {"a": 0.5}, "disable_adapters": True}
    setattr(module, field, values.get(field, ["a"]))
    assert fingerprint([outer]).state != before.state


STATES = {
    "written": lambda module: module.weight.mul_(2),
    "through_data": lambda module: setattr(module.weight, "data", module.weight.data * 2),
    "replaced": lambda module: setattr(module, "weight", torch.nn.Parameter(module.weight * 2)),
    "buffer": lambda module: module.running_mean.add_(1),
    "hook": lambda module: module.register_forward_hook(lambda *_: None),
    "pre_hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", STATES)
def test_fingerprint_sees_a_module_change(change):
    module = torch.nn.BatchNorm1d(3)
    outer = torch.nn.Sequential(module)
    before = fingerprint([outer])
    assert fingerprint([outer]).state == before.state
    STATES[change](module)
    assert fingerprint([outer]).state != before.state


def test_fingerprint_tells_modules_that_share_weights_apart():
    one, two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    assert fingerprint([one]).state != fingerprint([two]).state


def test_weights_without_a_version_counter_are_never_the_same():
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    before = fingerprint([module])
    assert fingerprint([module]).state != before.state


@pytest.mark.parametrize("change", ["scale", "switch_off", "fuse"])
def test_adapters_inside_the_caption_projection_are_noticed(transformer, change):
    inputs = tiny_inputs()
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["caption_projection.linear_1"])
    transformer.add_adapter(lora, "first")
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches(*inputs)
    if change == "scale":
        transformer.set_adapters(["first"], [0.25])
    elif change == "switch_off":
        transformer.disable_adapters()
    else:
        transformer.fuse_lora(lora_scale=0.5)
    assert_right(transformer, denoiser, inputs)


def test_a_prompt_in_memory_that_torch_does_not_own_is_noticed(transformer):
    shared, cond, uncond = tiny_inputs()
    memory = cond["encoder_hidden_states"].numpy().copy()
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches(shared, {**cond, "encoder_hidden_states": torch.from_numpy(memory)}, uncond)
    memory *= 2
    assert_right(transformer, denoiser, (shared, {**cond, "encoder_hidden_states": torch.from_numpy(memory)}, uncond))


def test_views_with_other_layouts_are_other_inputs():
    memo, x = Memo(), torch.arange(6.0)
    views = [x[:4].view(2, 2), x[:4].view(2, 2).T, x[1:5].view(2, 2), x[:4]]
    for view in views * 2:
        assert torch.equal(memo.get("double", (view,), lambda view=view: 2 * view), 2 * view)
    assert len(memo) == len(views)


def test_another_prompt_leaves_nothing_owned():
    memo, prompts = Memo(), [torch.ones(2), torch.ones(2)]
    results = []
    for prompt in prompts:
        memo.keep_only(fingerprint([]), None, [prompt])
        results.append(memo.get("double", (prompt,), lambda prompt=prompt: 2 * prompt))
    assert [memo.owns(result) for result in results] == [False, True]


def test_key_norms_of_the_prompt_run_once(transformer):
    calls = []
    norm = transformer.transformer_blocks[3].attn2.norm_k
    inner, norm.forward = norm.forward, lambda x: calls.append(1) or inner(x)
    with Denoiser(transformer, CONFIG) as denoiser:
        for _ in range(3):
            denoiser.branches(*tiny_inputs())
            assert len(calls) > 0
        calls.clear()
        inputs = tiny_inputs()
        for _ in range(3):
            denoiser.branches(*inputs)
    assert len(calls) == 1


def test_inference_mode_keeps_nothing(transformer):
    with torch.inference_mode():
        inputs = tiny_inputs()
        denoiser = Denoiser(transformer, CONFIG)
        denoiser.branches(*inputs)
        assert len(denoiser.memo) == 0
        assert_right(transformer, denoiser, inputs)


def test_lora_scale_in_attention_kwargs_is_noticed(transformer):
    shared, cond, uncond = tiny_inputs()
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["attn2.to_k", "attn2.to_v"])
    transformer.add_adapter(lora)
    denoiser = Denoiser(transformer, CONFIG)
    denoiser.branches({**shared, "attention_kwargs": {"scale": 1.0}}, cond, uncond)
    assert_right(transformer, denoiser, ({**shared, "attention_kwargs": {"scale": 0.0}}, cond, uncond))


def test_inference_mode_with_outside_tensors(transformer):
    inputs = tiny_inputs()
    with torch.inference_mode():
        denoiser = Denoiser(transformer, CONFIG)
        assert_right(transformer, denoiser, inputs)


def test_memory_does_not_grow_with_the_steps(transformer):
    shared, cond, uncond = tiny_inputs()
    lora = LoraConfig(r=2, target_modules=["attn2.to_k"])
    with Denoiser(transformer, CONFIG) as denoiser:
        transformer.add_adapter(lora)
        sizes = []
        for _ in range(3):
            denoiser.branches(shared, cond, uncond)
            sizes.append(len(denoiser.memo))
    assert sizes[0] == sizes[-1] > 0


def test_memory_is_bounded_where_every_step_has_another_prompt(transformer):
    sizes = []
    with Denoiser(transformer, CONFIG) as denoiser:
        for step in range(4):
            denoiser.branches(*tiny_inputs(seed=step))
            sizes.append(len(denoiser.memo))
    assert sizes == [sizes[0]] * 4


def test_a_freed_tensor_is_not_taken_for_a_new_one():
    memo = Memo()
    results = [
        memo.get("double", (torch.full((1000,), float(i)),), lambda i=i: torch.tensor([2.0 * i])) for i in range(50)
    ]
    assert [result.item() for result in results] == [2.0 * i for i in range(50)]


def test_nothing_is_kept_where_gradients_are_recorded():
    memo, x = Memo(), torch.ones(2)
    with torch.enable_grad():
        memo.get("double", (x,), lambda: 2 * x)
    assert len(memo) == 0


def test_what_was_cleared_is_not_owned():
    memo, x = Memo(), torch.ones(2)
    result = memo.get("double", (x,), lambda: 2 * x)
    assert memo.owns(result[1:])
    memo.clear()
    assert not memo.owns(result)


def test_a_result_written_by_its_user_is_computed_again():
    memo, x = Memo(), torch.ones(2)
    memo.get("double", (x,), lambda: 2 * x).add_(1)
    assert torch.equal(memo.get("double", (x,), lambda: 2 * x), torch.tensor([2.0, 2.0]))


def test_equal_timesteps_are_embedded_once():
    transformer = tiny_transformer()
    shared, cond, uncond = tiny_inputs(2, per_token=True)
    sizes = []
    transformer.time_embed.linear.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with Denoiser(transformer, CONFIG) as denoiser:
        denoiser.branches(shared, cond, uncond)
    assert sizes == [2]


@pytest.mark.parametrize("max_rows", [None, 1, 2])
def test_prompt_is_projected_once_where_kept_rows_are_not_adjacent(transformer, calls, max_rows):
    shared, cond, uncond = tiny_inputs()
    skips = (Skip((0,)), Skip((2,)), Skip((1, 3)))
    config = STGConfig(layers=(1,), extra_skips=skips)
    with Denoiser(transformer, config, max_rows=max_rows) as denoiser:
        apart = [i for i, names in enumerate(denoiser.plans().rows) if "skip" not in names and "skip2" in names]
        assert apart, "the plan has no block whose rows lie apart"
        counts = []
        for step in range(3):
            denoiser.branches({**shared, "timestep": shared["timestep"] - step}, cond, uncond)
            counts.append(calls["transformer_blocks.3.attn2.to_k"])
    assert counts[0] == counts[2] > 0


@pytest.mark.parametrize("max_rows", [1, 2])
def test_max_rows_bounds_every_module(transformer, max_rows):
    shared, cond, uncond = tiny_inputs(3, per_token=True)
    rows = {}
    for path, module in transformer.named_modules():
        if not list(module.children()):
            inner = module.forward

            def counted(*args, inner=inner, path=path, **kwargs):
                tokens = args[0].ndim == 2 and len(args[0]) // 24  # time embedding: flat, 24 timesteps a video
                rows[path] = max(rows.get(path, 0), tokens or len(args[0]))
                return inner(*args, **kwargs)

            module.forward = counted
    with Denoiser(transformer, CONFIG, max_rows=max_rows) as denoiser:
        denoiser.branches(shared, cond, uncond)
    unbounded = {path for path, count in rows.items() if count > max_rows}
    # One elementwise norm of the last hidden states, and what prepares them, sees all rows.
    assert unbounded <= {"norm_out", "time_embed.emb.time_proj"}


def test_self_attention_results_do_not_outlive_their_block(transformer):
    shared, cond, uncond = tiny_inputs()
    kept = []
    with Denoiser(transformer, CONFIG, max_rows=1) as denoiser:
        transformer.transformer_blocks[1].register_forward_pre_hook(
            lambda *_: kept.append(len(denoiser._slot.run._attended))
        )
        denoiser.branches(shared, cond, uncond)
    assert kept
    assert not any(kept)
