"""On a CUDA device, at LTX-Video 2B's true shape: parity in bfloat16, bitwise serial execution, memory."""

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from engine.tiny import latents_of, tiny_pipeline

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
