"""On a CUDA device, at LTX-Video 2B's true shape: parity in bfloat16, bitwise serial execution, memory."""

from dataclasses import replace
from inspect import signature

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from engine.tiny import latents_of, tiny_inputs, tiny_pipeline, tiny_transformer

import stg_engine
from stg_engine import Denoiser, STGConfig
from stg_engine.reference import passes_in_one_batch, passes_one_by_one

pytestmark = pytest.mark.gpu

FRAMES, HEIGHT, WIDTH, TEXT = 16, 16, 24, 128  # 6,144 tokens
CONFIG = STGConfig.preset("ltx-video-2b")


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LTXVideoTransformer3DModel()  # the defaults are the 2B checkpoint's
    return model.eval().to(torch.bfloat16)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    shared = {
        "hidden_states": normal(1, FRAMES * HEIGHT * WIDTH, 128),
        "timestep": torch.tensor([700.0], device="cuda"),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
    masks = [torch.arange(TEXT, device="cuda")[None] < length for length in (40, 7)]
    cond, uncond = (
        {"encoder_hidden_states": normal(1, TEXT, 4096), "encoder_attention_mask": mask.long()} for mask in masks
    )
    return shared, cond, uncond


@torch.no_grad()
def test_bf16_is_within_the_error_of_plain_passes(transformer, inputs):
    widened = [{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in group.items()} for group in inputs]
    plain = passes_one_by_one(transformer, CONFIG.skips, *inputs)
    batched = passes_in_one_batch(transformer, CONFIG.skips, *inputs)
    with Denoiser(transformer, CONFIG, kernels="off") as denoiser:
        engine = denoiser.branches(*inputs)
    exact = passes_one_by_one(transformer.float(), CONFIG.skips, *widened)
    transformer.to(torch.bfloat16)
    runs = (plain, batched, engine, exact)
    compared = [tuple(branches[name].float() for branches in runs) for name in exact]
    compared.append(tuple(branches["cond"].float() - branches["skip"].float() for branches in runs))
    for low, another_order, ours, reference in compared:
        assert (ours - reference).norm() <= (low - reference).norm() + (another_order - low).norm()


@torch.no_grad()
def test_serial_is_bitwise_equal_to_plain_passes(transformer, inputs):
    plain = passes_one_by_one(transformer, CONFIG.skips, *inputs)
    with Denoiser(transformer, CONFIG, execution="serial", kernels="off") as denoiser:
        engine = denoiser.branches(*inputs)
    for name in plain:
        assert torch.equal(engine[name], plain[name]), name


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_compiled_blocks_are_as_near_as_plain_passes(transformer, inputs, mode):
    widened = [{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in group.items()} for group in inputs]
    plain = passes_one_by_one(transformer, CONFIG.skips, *inputs)
    batched = passes_in_one_batch(transformer, CONFIG.skips, *inputs)
    with Denoiser(transformer, replace(CONFIG, stop=0.5), compile=mode) as denoiser:
        engine = denoiser.branches(*inputs, progress=0.1)
        assert f"torch.compile ({mode}) in 27 of 28 blocks" in denoiser.compiler.used
        with torch.compiler.set_stance("fail_on_recompile"):
            for progress in (0.3, 0.7):  # without skips, too
                denoiser(*inputs, guidance_scale=3.0, progress=progress)
    exact = passes_one_by_one(transformer.float(), CONFIG.skips, *widened)
    transformer.to(torch.bfloat16)
    for name in exact:
        budget = (plain[name].float() - exact[name]).norm() + (batched[name] - plain[name]).float().norm()
        assert (engine[name].float() - exact[name]).norm() <= budget, name


@torch.no_grad()
@pytest.mark.skipif("graph" not in signature(Denoiser).parameters, reason="no CUDA graphs in this version")
def test_compiled_blocks_in_a_graph(transformer, inputs):
    with Denoiser(transformer, CONFIG, compile="default") as denoiser:
        expected = denoiser(*inputs, guidance_scale=3.0)
    with Denoiser(transformer, CONFIG, compile="default", graph=True) as denoiser:
        for _ in range(3):
            assert torch.equal(denoiser(*inputs, guidance_scale=3.0), expected)


@torch.no_grad()
def test_the_same_call_twice_gives_the_same_bits(transformer, inputs):
    with Denoiser(transformer, CONFIG) as denoiser:
        first, second = (denoiser(*inputs, guidance_scale=3.0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_pipelines(offload):
    plain, pipe = tiny_pipeline().to("cuda"), tiny_pipeline()
    # Sequential offload hooks every norm, so that its blocks run as modules.
    with stg_engine.attach(plain, STGConfig(layers=(2,)), kernels="off"):
        expected = latents_of(plain)
    getattr(pipe, f"enable_{offload}_cpu_offload")()
    with stg_engine.attach(pipe, STGConfig(layers=(2,)), kernels="off") as engine:
        assert torch.equal(latents_of(pipe), expected)
        assert engine.report().device == torch.cuda.get_device_name()
        assert engine.report().peak_bytes > 0


@torch.no_grad()
@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_fused_blocks_are_as_near_as_plain_passes(transformer, inputs, execution):
    widened = [{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in group.items()} for group in inputs]
    plain = passes_one_by_one(transformer, CONFIG.skips, *inputs)
    batched = passes_in_one_batch(transformer, CONFIG.skips, *inputs)
    with Denoiser(transformer, CONFIG, execution=execution) as denoiser:
        engine = denoiser.branches(*inputs)
        assert denoiser.fusion.used == "stg_kernels (Triton) in 28 of 28 blocks"
    exact = passes_one_by_one(transformer.float(), CONFIG.skips, *widened)
    transformer.to(torch.bfloat16)
    for name in exact:
        budget = (plain[name].float() - exact[name]).norm() + (batched[name] - plain[name]).float().norm()
        assert (engine[name].float() - exact[name]).norm() <= budget, name


# Graphs: with fixed kernels a replay has the bits of the forward that it was captured from.


def moved(group, scale=1.0):
    return {**group, "hidden_states": group["hidden_states"] * scale} if "hidden_states" in group else group


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_graphs_equal_the_eager_engine(dtype, kernels, execution):
    model = tiny_transformer(dtype=dtype).to("cuda")
    inputs = [
        {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in group.items()}
        for group in tiny_inputs(2, dtype=dtype)
    ]
    options = {"kernels": kernels, "execution": execution}
    given = [(moved(inputs[0], scale), *inputs[1:]) for scale in (1.0, 2.0, 3.0)]
    with Denoiser(model, STGConfig(layers=(2,)), **options) as denoiser:
        expected = [denoiser(*each, guidance_scale=3.0) for each in given]
    with Denoiser(model, STGConfig(layers=(2,)), graph=True, **options) as denoiser:
        held = [denoiser(*each, guidance_scale=3.0) for each in given]  # all held until the last has run
        assert (denoiser.graphs.captured, denoiser.graphs.replayed) == (1, 2)
        assert all(map(torch.equal, held, expected))


@torch.no_grad()
def test_graphs_at_the_true_shape(transformer, inputs):
    with Denoiser(transformer, CONFIG) as denoiser:
        expected = denoiser(*inputs, guidance_scale=3.0)
        eager_peak = peak_of(denoiser, inputs)
    with Denoiser(transformer, CONFIG, graph=True) as denoiser:
        held = [denoiser(*inputs, guidance_scale=3.0) for _ in range(3)]
        before = torch.cuda.memory_allocated()
        denoiser.release()
        assert torch.cuda.memory_allocated() < before
        graph_peak = peak_of(denoiser, inputs)
    assert all(torch.equal(result, expected) for result in held)
    assert graph_peak <= 2 * eager_peak  # a warm-up, and the graph's own memory


def peak_of(denoiser, inputs):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    for _ in range(2):
        denoiser(*inputs, guidance_scale=3.0)
    return torch.cuda.max_memory_allocated() - weights


@torch.no_grad()
def test_graphs_of_rows_and_skips_share_a_pool_in_any_order(transformer, inputs):
    config = STGConfig(layers=(19,), start=0.3, stop=0.7)
    with Denoiser(transformer, config) as denoiser:
        expected = [denoiser(*inputs, guidance_scale=3.0, progress=at) for at in (0.0, 0.5)]
    with Denoiser(transformer, config, graph=True) as denoiser:
        steps = [0.0, 0.5, 0.0, 0.9, 0.5, 0.6, 0.0]
        results = [denoiser(*inputs, guidance_scale=3.0, progress=at) for at in steps]
        assert (denoiser.graphs.captured, denoiser.graphs.replayed) == (2, 5)
    for at, result in zip(steps, results, strict=True):
        assert torch.equal(result, expected[0.3 <= at < 0.7])


@torch.no_grad()
def test_graphs_follow_a_changed_model(transformer, inputs):
    weight = transformer.transformer_blocks[3].attn1.to_q.weight
    with Denoiser(transformer, CONFIG, graph=True) as denoiser:
        first = denoiser(*inputs, guidance_scale=3.0)
        weight.neg_()
        in_place = denoiser(*inputs, guidance_scale=3.0)
        assert (denoiser.graphs.captured, denoiser.graphs.replayed) == (1, 1)
        transformer.transformer_blocks[3].attn1.to_q.weight = torch.nn.Parameter(-weight)
        replaced = denoiser(*inputs, guidance_scale=3.0)
        transformer.to("cpu").to("cuda")
        returned = denoiser(*inputs, guidance_scale=3.0)
    assert not torch.equal(first, in_place)
    assert torch.equal(first, replaced)
    assert torch.equal(first, returned)


@torch.no_grad()
def test_a_capture_that_fails_leaves_device_and_denoiser_usable(transformer, inputs):
    with Denoiser(transformer, CONFIG) as denoiser:
        expected = denoiser(*inputs, guidance_scale=3.0)

    def wait(module, args, output):
        output.sum().item()

    hook = transformer.transformer_blocks[2].register_forward_hook(wait)
    with Denoiser(transformer, CONFIG, graph=True, kernels="off") as denoiser:
        with pytest.raises(RuntimeError, match=r"LTX-Video cannot be captured as a CUDA graph.*use graph=False"):
            denoiser(*inputs, guidance_scale=3.0)
        assert not torch.cuda.is_current_stream_capturing()
        hook.remove()
    with Denoiser(transformer, CONFIG, graph=True) as denoiser:
        results = [denoiser(*inputs, guidance_scale=3.0) for _ in range(2)]
        assert denoiser.graphs.replayed == 1
    assert all(torch.equal(result, expected) for result in results)
    torch.cuda.empty_cache()
    torch.empty(2**20, device="cuda").fill_(1.0).sum().item()  # the allocator serves the default pool again


@torch.no_grad()
def test_graphs_on_streams_of_the_user(transformer, inputs):
    with Denoiser(transformer, CONFIG) as denoiser:
        expected = [denoiser(moved(inputs[0], scale), *inputs[1:], guidance_scale=3.0) for scale in (1.0, 2.0)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    with Denoiser(transformer, CONFIG, graph=True) as denoiser:
        for i in range(6):
            with torch.cuda.stream(streams[i % 2]):
                results.append(denoiser(moved(inputs[0], 1.0 + i % 2), *inputs[1:], guidance_scale=3.0))
        torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % 2])


def test_graphs_in_pipelines():
    pipe = tiny_pipeline().to("cuda")
    config = STGConfig(layers=(2,), start=0.3)
    with stg_engine.attach(pipe, config):
        expected = latents_of(pipe, num_inference_steps=5)
    with stg_engine.attach(pipe, config, graph=True) as engine:
        for _ in range(2):
            assert torch.equal(latents_of(pipe, num_inference_steps=5), expected)
            assert engine.report().graphs == "2 captured, 3 replays"


def test_sequential_offload_has_no_graphs():
    pipe = tiny_pipeline()
    pipe.enable_sequential_cpu_offload()
    with stg_engine.attach(pipe, STGConfig(layers=(2,)), graph=True), pytest.raises(RuntimeError, match="offloading"):
        latents_of(pipe)
