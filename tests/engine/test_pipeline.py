"""Pipelines with the engine attached against independent three-pass loops, and every feature that must keep working."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from engine.tiny import CALL, latents_of, on_step, tiny_pipeline
from peft import LoraConfig
from PIL import Image

import stg_engine
from stg_engine import Skip, STGConfig

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
CONFIG = STGConfig(layers=(2,), scale=1.5)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
KINDS = [LTXPipeline, LTXImageToVideoPipeline, LTXConditionPipeline]


def call_arguments(kind, videos=1):
    return {LTXPipeline: {}, LTXImageToVideoPipeline: {"image": [PICTURE] * videos}}.get(kind, {"image": PICTURE})


def three_pass(pipe, skips, rescale=0.0):
    """Make an untouched pipeline's transformer answer every call with plain passes, one after another."""
    transformer = pipe.transformer
    plain = transformer.forward

    def skipping(layers, mode, arguments):
        undo = []
        for layer in layers:
            block = transformer.transformer_blocks[layer]
            if mode == "residual":
                undo.append((block, block.forward))
                block.forward = lambda hidden_states, **_: hidden_states
            else:
                attention = block.attn1
                undo.append((attention, attention.forward))
                attention.forward = lambda hidden_states, attention=attention, **_: attention.to_out[0](
                    attention.to_v(hidden_states)
                )
        prediction = plain(**arguments)[0]
        for module, forward in undo:
            module.forward = forward
        return prediction

    def forward(**arguments):
        rows = len(arguments["hidden_states"])
        guided = pipe.do_classifier_free_guidance
        half = rows // 2 if guided else 0

        def part(which):
            return {k: v[which] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

        c = plain(**part(slice(half, rows)))[0]
        out = c
        if guided:
            u = plain(**part(slice(0, half)))[0]
            out = u + pipe.guidance_scale * (c - u)
        for layers, scale, mode in skips:
            out = out + scale * (c - skipping(layers, mode, part(slice(half, rows))))
        if rescale:
            ratio = c.flatten(1).std(1) / out.flatten(1).std(1)
            out = out * (rescale * ratio + 1 - rescale)[:, None, None]
        return (torch.cat([out, out]) if guided else out,)

    transformer.forward = forward
    return pipe


def own_loop(pipe, prompt, config, guidance_scale, seed=0):
    """Text to video written out: encode, three calls a step, Euler."""
    device = torch.device("cpu")
    embeds, mask, negative, negative_mask = pipe.encode_prompt(prompt, device=device, max_sequence_length=16)
    latents = pipe.prepare_latents(1, 8, 32, 32, 9, torch.float32, device, torch.Generator().manual_seed(seed))
    sigmas = np.linspace(1.0, 1 / 3, 3)
    size = latents.shape[1]
    mu = 0.5 + (size - 256) * (1.15 - 0.5) / (4096 - 256)
    pipe.scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
    shared = {
        "num_frames": 3,
        "height": 8,
        "width": 8,
        "rope_interpolation_scale": (4 / 25, 4, 4),
        "return_dict": False,
    }
    model = pipe.transformer
    for t in pipe.scheduler.timesteps:
        call = {**shared, "hidden_states": latents, "timestep": t.expand(1)}
        c = model(**call, encoder_hidden_states=embeds, encoder_attention_mask=mask)[0]
        u = model(**call, encoder_hidden_states=negative, encoder_attention_mask=negative_mask)[0]
        block = model.transformer_blocks[config.layers[0]]
        inner, block.forward = block.forward, lambda hidden_states, **_: hidden_states
        p = model(**call, encoder_hidden_states=embeds, encoder_attention_mask=mask)[0]
        block.forward = inner
        guided = u + guidance_scale * (c - u) + config.scale * (c - p)
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


def assert_same_clip(actual, expected):
    assert (actual - expected).norm() <= FP32_RELATIVE * expected.norm()


def test_equals_a_loop_of_three_calls_per_step():
    pipe = tiny_pipeline()
    with torch.no_grad():
        expected = own_loop(pipe, "a red cat", CONFIG, 3.0)
    plain = latents_of(pipe)
    with stg_engine.attach(pipe, CONFIG):
        actual = latents_of(pipe)
    assert_same_clip(actual, expected)
    assert not torch.allclose(actual, plain, atol=1e-2)


CALLS = {
    "plain": {},
    "two_prompts": {"prompt": ["a red cat", "blue dog jumps over"]},
    "two_videos": {"num_videos_per_prompt": 2},
    "negative": {"negative_prompt": "blurry"},
    "no_cfg": {"guidance_scale": 1.0},
    "rescale": {"guidance_rescale": 0.7},
}


@pytest.mark.parametrize("execution", ["batched", "serial"])
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pipelines_equal_three_passes(kind, arguments, execution):
    videos = 2 if {"prompt", "num_videos_per_prompt"} & set(arguments) else 1
    arguments = {**call_arguments(kind, videos), **arguments}
    skips = [((2,), 1.5, "residual"), ((1, 3), 0.5, "attention")]
    rescale = arguments.get("guidance_rescale", 0.0)
    expected = latents_of(three_pass(tiny_pipeline(kind), skips, rescale), **arguments)
    pipe = tiny_pipeline(kind)
    config = STGConfig(layers=(2,), scale=1.5, extra_skips=(Skip((1, 3), 0.5, "attention"),))
    with stg_engine.attach(pipe, config, execution=execution):
        actual = latents_of(pipe, **arguments)
    assert_same_clip(actual, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_two_prompts_equal_the_two_single_calls(kind):
    # LTXConditionPipeline gives videos of one call another starting noise than single calls if it has an image.
    both_images, image = ({}, {}) if kind is LTXConditionPipeline else (call_arguments(kind, 2), call_arguments(kind))
    pipe, prompts = tiny_pipeline(kind), ["a red cat", "blue dog jumps over"]
    with stg_engine.attach(pipe, CONFIG):
        both = latents_of(pipe, prompts, **both_images)
        singles = [latents_of(pipe, prompt, seed=seed, **image) for seed, prompt in enumerate(prompts)]
    assert_same_clip(both, torch.cat(singles))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "config", [STGConfig(layers=(1,), scale=0.0), STGConfig(layers=(1,), start=0.99)], ids=["scale_0", "outside"]
)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_without_skips_it_is_plain_diffusers_bit_for_bit(kind, config, guidance_scale):
    pipe, arguments = tiny_pipeline(kind), {**call_arguments(kind), "guidance_scale": guidance_scale}
    plain = latents_of(pipe, **arguments)
    with stg_engine.attach(pipe, config) as engine:
        assert torch.equal(latents_of(pipe, **arguments), plain)
        assert (engine.report().steps, engine.report().guided_steps) == (CALL["num_inference_steps"], 0)


def test_a_pipeline_keeps_its_own_progress_bar():
    pipe = tiny_pipeline()
    totals = []
    plain = type(pipe).progress_bar

    def own(iterable=None, total=None):
        totals.append(total)
        return plain(pipe, iterable, total)

    pipe.progress_bar = own
    with stg_engine.attach(pipe, CONFIG):
        latents_of(pipe)
    assert totals == [3]
    assert pipe.progress_bar is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_low_precision_pipelines_are_as_near_as_three_plain_passes(kind, dtype):
    arguments = call_arguments(kind)

    skips = [((2,), 1.5, "residual")]
    exact = latents_of(three_pass(tiny_pipeline(kind).to(dtype).to(torch.float32), skips), **arguments).float()
    plain = latents_of(three_pass(tiny_pipeline(kind).to(dtype), skips), **arguments).float()
    pipe = tiny_pipeline(kind).to(dtype)
    with stg_engine.attach(pipe, CONFIG):
        actual = latents_of(pipe, **arguments).float()
    assert (actual - exact).norm() <= 1.5 * (plain - exact).norm()


def change_guidance_scale(pipe, index, tensors):
    pipe._guidance_scale = 2.0 + index
    return tensors


def replace_prompt(pipe, index, tensors):
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * (0.5 + index)}


def write_prompt(pipe, index, tensors):
    tensors["prompt_embeds"].mul_(0.5)
    return tensors


def replace_latents(pipe, index, tensors):
    return {**tensors, "latents": tensors["latents"] * 0.5}


CHANGES = [change_guidance_scale, replace_prompt, write_prompt, replace_latents]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_callbacks(change):
    skips = [((2,), 1.5, "residual")]
    expected = latents_of(three_pass(tiny_pipeline(), skips), **on_step(change))
    untouched = latents_of(three_pass(tiny_pipeline(), skips))
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG):
        actual = latents_of(pipe, **on_step(change))
    assert_same_clip(actual, expected)
    assert not torch.allclose(actual, untouched, atol=1e-3)


def test_guidance_switched_off_mid_run():
    """As diffusers' cutoff callback does it; the mask keeps its negative rows, which plain diffusers fails on."""

    def cut(pipe, index, tensors):
        if index == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    pipe = tiny_pipeline()
    rows = []
    pipe.transformer.transformer_blocks[3].ff.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with stg_engine.attach(pipe, CONFIG):
        clip = latents_of(pipe, **on_step(cut))
    assert rows == [3, 2, 2]
    assert clip.isfinite().all()


def test_interruption_ends_the_call_and_drops_what_was_kept():
    def interrupt(pipe, index, tensors):
        pipe._interrupt = index == 0
        return tensors

    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG) as engine:
        latents_of(pipe, **on_step(interrupt))
        assert engine.report().steps == 1
        assert len(engine.denoiser.memo) == 0
        expected = latents_of(pipe)
    fresh = tiny_pipeline()
    with stg_engine.attach(fresh, CONFIG):
        assert torch.equal(latents_of(fresh), expected)


def test_an_exception_drops_what_was_kept():
    def fail(pipe, index, tensors):
        raise KeyError("from a callback")

    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG) as engine:
        with pytest.raises(KeyError, match="from a callback"):
            latents_of(pipe, **on_step(fail))
        assert len(engine.denoiser.memo) == 0
        assert latents_of(pipe).isfinite().all()


def test_the_prompt_is_not_kept_alive_after_the_call():
    pipe = tiny_pipeline()
    kept = []

    def watch(pipe, index, tensors):
        kept.append(weakref.ref(tensors["prompt_embeds"]))
        return tensors

    with stg_engine.attach(pipe, CONFIG):
        latents_of(pipe, **on_step(watch))
        gc.collect()
        assert kept[0]() is None


@pytest.mark.parametrize("order", ["adapter_first", "engine_first"])
def test_lora(order):
    def with_adapter(pipe):
        torch.manual_seed(3)
        lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        pipe.transformer.add_adapter(lora)
        return pipe

    def call(pipe):
        return latents_of(pipe, attention_kwargs={"scale": 0.5})

    pipe = with_adapter(tiny_pipeline())
    expected = call(three_pass(with_adapter(tiny_pipeline()), [((2,), 1.5, "residual")]))
    if order == "adapter_first":
        engine = stg_engine.attach(pipe, CONFIG)
    else:
        pipe = tiny_pipeline()
        engine = stg_engine.attach(pipe, CONFIG)
        with_adapter(pipe)
    assert_same_clip(call(pipe), expected)
    assert not torch.allclose(call(pipe), latents_of(pipe), atol=1e-4), "the adapter's scale changes nothing"
    engine.detach()


def test_save_and_load_with_the_engine_on(tmp_path):
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG):
        expected = latents_of(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = LTXPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    plain = tiny_pipeline()
    assert torch.equal(latents_of(loaded), latents_of(plain))
    with stg_engine.attach(loaded, CONFIG):
        assert_same_clip(latents_of(loaded), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_cpu_offload(order):
    plain = tiny_pipeline()
    with stg_engine.attach(plain, CONFIG):
        expected = latents_of(plain)
    pipe = tiny_pipeline()
    if order == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    engine = stg_engine.attach(pipe, CONFIG)
    if order == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.device(engine.report().device).type == "cpu"
    for _ in range(3):  # Accelerate takes its wrappers off and puts them back after every call
        assert torch.equal(latents_of(pipe), expected)
        assert engine.report().guided_steps == 3
    engine.detach()
    untouched = tiny_pipeline()
    assert torch.equal(latents_of(pipe), latents_of(untouched))
    pipe.remove_all_hooks()
    assert torch.equal(latents_of(pipe), latents_of(untouched))


def test_a_lost_hook_is_an_error():
    pipe = tiny_pipeline()
    original = pipe.transformer.forward
    engine = stg_engine.attach(pipe, CONFIG)
    pipe.transformer.forward = original
    with pytest.raises(RuntimeError, match="no longer in the transformer's forward"):
        latents_of(pipe)
    engine.detach()


def test_a_replaced_transformer_is_an_error():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG):
        pipe.transformer = tiny_pipeline().transformer
        with pytest.raises(RuntimeError, match=r"pipe.transformer was replaced"):
            latents_of(pipe)


def test_another_pipeline_on_the_same_transformer_is_an_error():
    pipe = tiny_pipeline()
    other = LTXImageToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with (
        stg_engine.attach(pipe, CONFIG),
        pytest.raises(RuntimeError, match="outside the denoising loop of the LTXPipeline"),
    ):
        latents_of(other, image=PICTURE)
    with stg_engine.attach(other, CONFIG):
        assert latents_of(other, image=PICTURE).isfinite().all()


def test_two_threads_with_a_pipe_each():
    configs = [CONFIG, STGConfig(layers=(1, 3), mode="attention", scale=2.0)]
    expected = []
    for config in configs:
        pipe = tiny_pipeline()
        with stg_engine.attach(pipe, config):
            expected.append(latents_of(pipe))
    pipes = [tiny_pipeline() for _ in configs]
    results = [None, None]

    def run(i):
        with stg_engine.attach(pipes[i], configs[i]):
            results[i] = [latents_of(pipes[i]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, clip in zip(results, expected, strict=True):
        assert all(torch.equal(item, clip) for item in result)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_detach_leaves_the_pipeline_as_it_was(kind):
    pipe, arguments = tiny_pipeline(kind), call_arguments(kind)
    plain = latents_of(pipe, **arguments)
    attributes = set(vars(pipe))
    engine = stg_engine.attach(pipe, CONFIG)
    with pytest.raises(ValueError, match="on it already"):
        stg_engine.attach(pipe, CONFIG)
    latents_of(pipe, **arguments)
    engine.detach()
    engine.detach()
    assert set(vars(pipe)) == attributes
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(latents_of(pipe, **arguments), plain)


def test_detach_without_the_engine():
    pipe = tiny_pipeline()
    plain = latents_of(pipe)
    engine = stg_engine.attach(pipe, CONFIG)
    stg_engine.detach(pipe)
    stg_engine.detach(pipe)
    assert torch.equal(latents_of(pipe), plain)
    with pytest.raises(RuntimeError, match="detached"), engine:
        pass


def test_an_exception_inside_with_detaches():
    pipe = tiny_pipeline()
    with pytest.raises(ZeroDivisionError), stg_engine.attach(pipe, CONFIG):
        raise ZeroDivisionError
    stg_engine.attach(pipe, CONFIG).detach()


def test_unsupported_pipeline():
    with pytest.raises(TypeError, match="pipe is a object; supported pipelines: LTXPipeline, "):
        stg_engine.attach(object(), CONFIG)


def test_a_pipeline_without_a_transformer():
    pipe = tiny_pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match="LTXPipeline has no transformer; load one"):
        stg_engine.attach(pipe, CONFIG)


def test_report_says_what_ran():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG, kernels="off") as engine:
        latents_of(pipe, guidance_scale=1.0)
        report = engine.report()
    assert report.steps == report.guided_steps == CALL["num_inference_steps"]
    assert report.differences["skip"] > 0
    assert report.seconds > 0
    assert engine.plan.pass_equivalents == 1.25
    for part in ("1.25 pass-equivalents", "LTX-Video, float32 on cpu", "batched", "diffusers native", "max |c - p|"):
        assert part in str(report)


def test_a_skip_that_changes_nothing_is_reported():
    pipe = tiny_pipeline()
    block = pipe.transformer.transformer_blocks[2]
    with torch.no_grad():
        for weight in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            weight.weight.zero_()
            weight.bias.zero_()
    with stg_engine.attach(pipe, CONFIG) as engine, pytest.warns(UserWarning, match="branch 'skip' equals cond"):
        latents_of(pipe)
    assert engine.report().differences == {"skip": 0.0}
    assert "changes nothing" in str(engine.report())
