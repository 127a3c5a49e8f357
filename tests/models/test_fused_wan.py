"""The fused block of Wan and SkyReels-V2: what is its own. `test_fused.py` has what all families share."""

from types import SimpleNamespace

import pytest
import stg_kernels
import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from models.case import randomise, relative_error
from models.families.wan import CASES, IMAGE, model
from stg_kernels import choose

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.fused import wan

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
BY_NAME = {case.name: case for case in CASES}
CHANNELS, TOKENS, VIDEOS = 24, 6, (1, 0, 1)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=["reference", "native"])
def implementation(request, monkeypatch):
    """What the ops run on a CPU; an installation without the compiled library has the references alone."""
    if request.param == "native" and "cpu" not in stg_kernels.native_devices():
        pytest.skip("stg_kernels._C was not built")
    if request.param == "reference":
        monkeypatch.setattr(choose, "native_devices", frozenset)
        monkeypatch.setattr(stg_kernels, "accelerates", lambda device: True)


class Form:
    """A block of one form, and its arguments: rows of the videos VIDEOS, the modulation of two videos."""

    def __init__(self, skyreels=False, per_token=False, causal=False, **config):
        self.kind = {"kind": SkyReelsV2Transformer3DModel} if skyreels else {}
        self.config, self.causal = config, causal
        per_timestep = (TOKENS,) if per_token else ()
        self.modulation = (6, *per_timestep) if skyreels else (*per_timestep, 6)
        self.text = 5 + 512 if "added_kv_proj_dim" in config else 7

    def transformer(self, dtype, seed=0):
        return randomise(model(dtype, num_layers=1, **self.kind, **self.config), seed)

    def arguments(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None] if self.causal else None
        return {
            "hidden_states": normal(len(VIDEOS), TOKENS, CHANNELS),
            "encoder_hidden_states": normal(len(VIDEOS), self.text, CHANNELS),
            "temb": normal(2, *self.modulation, CHANNELS),
            "rotary_emb": WanRotaryPosEmbed(CHANNELS // 2, (1, 1, 1), 32)(torch.empty(1, 1, TOKENS, 1, 1)),
            **({"attention_mask": causal} if self.kind else {}),
        }


FORMS = {
    "Wan": Form(),
    "Wan without norm2": Form(cross_attn_norm=False),
    "Wan with image": Form(**IMAGE),
    "Wan, timesteps of tokens": Form(per_token=True),
    "SkyReels-V2": Form(skyreels=True),
    "SkyReels-V2 with image": Form(skyreels=True, **IMAGE),
    "SkyReels-V2, timesteps of tokens": Form(skyreels=True, per_token=True, causal=True),
}
WITH_IMAGE = FORMS["Wan with image"]
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def plain(block, arguments):
    return block(**{**arguments, "temb": arguments["temb"][list(VIDEOS)]})


def fused(transformer, arguments):
    (block,) = transformer.blocks
    assert wan.supports(transformer, block, arguments["hidden_states"].dtype)
    run = SimpleNamespace(
        videos_of_rows=lambda device: torch.tensor(VIDEOS),
        once=lambda name, source, compute: compute(),
        self_attention=lambda index, module, forward, arguments, **_: forward(**arguments),
    )
    return wan.forward(run, 0, block, **arguments)


@each_form
def test_a_block_is_its_module(form):
    transformer, arguments = form.transformer(torch.float32), form.arguments(torch.float32)
    expected = plain(transformer.blocks[0], arguments)
    assert relative_error(fused(transformer, arguments), expected) <= FP32_RELATIVE


NORMS = [
    *(("norm1",), ("norm2",), ("norm3",), ("attn1.norm_q", "attn1.norm_k")),
    *(("attn2.norm_q",), ("attn2.norm_k",), ("attn2.norm_added_k",)),
]


@pytest.mark.parametrize("paths", NORMS, ids=str)
def test_eps_is_the_norm_s_own(paths):
    transformer, arguments = WITH_IMAGE.transformer(torch.float32), WITH_IMAGE.arguments(torch.float32)
    before = plain(transformer.blocks[0], arguments)
    for path in paths:
        transformer.blocks[0].get_submodule(path).eps = 0.5
    expected = plain(transformer.blocks[0], arguments)
    assert relative_error(before, expected) > 10 * FP32_RELATIVE
    assert relative_error(fused(transformer, arguments), expected) <= FP32_RELATIVE


def widened(value):
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@each_form
def test_bf16_is_as_near_as_the_module(form):
    """Over many blocks, as they are loaded and with all in bf16, the ratio of errors is at most 1, two standard errors
    aside."""
    ratios = []
    for seed in range(40):
        transformer, arguments = form.transformer(torch.bfloat16, seed), form.arguments(torch.bfloat16, seed)
        if seed % 2:  # `.to(dtype)` after loading
            transformer.to(torch.bfloat16)
            arguments["rotary_emb"] = tuple(table.bfloat16() for table in arguments["rotary_emb"])
        (block,) = transformer.blocks
        exact_block = form.transformer(torch.float64).blocks[0]
        exact_block.load_state_dict(block.state_dict())
        exact = plain(exact_block, {name: widened(value) for name, value in arguments.items()})
        outputs = (fused(transformer, arguments), plain(block, arguments))
        errors = [(output.double() - exact).norm() for output in outputs]
        ratios.append(errors[0] / errors[1])
    ratio = torch.stack(ratios)
    assert ratio.mean() <= 1 + 2 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize(
    ("path", "dtype", "expected"),
    [
        ("norm2", torch.bfloat16, True),
        ("norm2", torch.float32, True),
        ("norm2", torch.float16, False),
        *((f"attn1.norm_{x}", torch.float32, False) for x in "qk"),
        *((f"attn2.norm_{x}", torch.float32, False) for x in ("q", "k", "added_k")),
    ],
)
def test_dtypes_of_norm_weights(path, dtype, expected):
    transformer = WITH_IMAGE.transformer(torch.bfloat16)
    (block,) = transformer.blocks
    block.get_submodule(path).to(dtype)
    assert wan.supports(transformer, block, torch.bfloat16) is expected


@pytest.mark.parametrize(("path", "eps"), [("attn1.norm_k", 0.5), ("attn1.norm_k", None), ("attn2.norm_q", None)])
def test_eps_that_the_ops_do_not_have(path, eps):
    transformer = WITH_IMAGE.transformer(torch.float32)
    (block,) = transformer.blocks
    block.get_submodule(path).eps = eps
    assert not wan.supports(transformer, block, torch.float32)


@pytest.mark.parametrize("path", ["attn1", "attn2"])
def test_context_parallel_attention_runs_as_modules(path):
    transformer = WITH_IMAGE.transformer(torch.float32)
    (block,) = transformer.blocks
    block.get_submodule(path).processor._parallel_config = object()
    assert not wan.supports(transformer, block, torch.float32)


EVERY_FORK = STGConfig(layers=(1, 3), extra_skips=(Skip((0, 2), mode="attention"), Skip((0,)), Skip((2,))))


def assert_equals_passes(case, transformer, fused_blocks, config=EVERY_FORK, **options):
    """The branches are those of the modules, and so many of the four blocks were fused."""
    inputs = case.inputs(2, torch.float32)
    expected = case.passes(transformer, config.skips, *inputs)
    with Denoiser(transformer, config, **options) as denoiser:
        for _ in range(2):  # the second call takes prompt keys and values from the first
            actual = denoiser.branches(*inputs)
        assert f"(C++) in {fused_blocks} of 4 blocks" in denoiser.fusion.used or not fused_blocks
        assert denoiser.fusion.is_on is (fused_blocks > 0)
    for name, (tensor,) in expected.items():
        assert relative_error(actual[name], tensor) <= FP32_RELATIVE, name


@pytest.mark.parametrize("name", ["Wan I2V", "SkyReels-V2 I2V"])
def test_without_norm2(name):
    case = BY_NAME[name]
    assert_equals_passes(case, case.model(torch.float32, cross_attn_norm=False), 4)


@pytest.mark.parametrize("name", ["Wan I2V", "SkyReels-V2 I2V"])
@pytest.mark.parametrize("path", ["attn1", "attn2"])
def test_fused_projections_run_as_modules(path, name):
    case = BY_NAME[name]
    transformer = case.model(torch.float32)
    attention = transformer.blocks[2].get_submodule(path)
    attention.fuse_projections()
    for projection in (attention.to_k, attention.to_v):
        projection.weight.zero_()  # nothing reads it any more
    assert_equals_passes(case, transformer, 3, STGConfig(layers=(1,)))


def warped(tables):
    return tuple(table * torch.linspace(0.5, 1, table.shape[1])[:, None, None] for table in tables)


def warp_by_hook(rope):
    rope.register_forward_hook(lambda module, args, tables: warped(tables))


def warp_by_forward(rope):
    forward = rope.forward
    rope.forward = lambda *args: warped(forward(*args))


def warp_by_class(rope):
    kind = type(rope)
    rope.__class__ = type("Other", (kind,), {"forward": lambda *args: warped(kind.forward(*args))})


def warp_by_buffer(rope):
    rope.freqs_cos = rope.freqs_cos * torch.linspace(0.5, 1, rope.freqs_cos.shape[1])
    rope.freqs_sin = rope.freqs_sin[:, torch.randperm(rope.freqs_sin.shape[1])]


@pytest.mark.parametrize(
    ("change", "fused_blocks"), [(warp_by_hook, 0), (warp_by_forward, 0), (warp_by_class, 0), (warp_by_buffer, 4)]
)
@pytest.mark.parametrize("name", ["Wan T2V", "SkyReels-V2 T2V"])
def test_rope_that_was_changed(name, change, fused_blocks):
    case = BY_NAME[name]
    transformer = case.model(torch.float32)
    change(transformer.rope)
    assert_equals_passes(case, transformer, fused_blocks)


@pytest.mark.parametrize("path", ["attn1", "attn2"])
@pytest.mark.parametrize("name", ["Wan I2V", "SkyReels-V2 DF"])
def test_an_attention_backend_that_was_set_is_used(name, path, monkeypatch):
    backend, backends = AttentionBackendName._NATIVE_MATH, _AttentionBackendRegistry._backends
    calls, run = [], backends[backend]
    monkeypatch.setitem(backends, backend, lambda *args, **kwargs: calls.append(1) or 2 * run(*args, **kwargs))
    case = BY_NAME[name]
    transformer = case.model(torch.float32)
    for block in transformer.blocks:
        block.get_submodule(path).processor._attention_backend = backend
    assert_equals_passes(case, transformer, 4)
    assert calls


def test_a_row_that_skips_attention_takes_the_values_of_the_row_it_forks_from():
    case = BY_NAME["Wan TI2V"]
    transformer, inputs = case.model(torch.float32), case.inputs(2, torch.float32)
    rows = []
    for layer in (1, 2):
        transformer.blocks[layer].attn1.to_v.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with Denoiser(transformer, STGConfig(layers=(1, 2), mode="attention")) as denoiser:
        denoiser.branches(*inputs)
    assert rows == [4, 4, 2]  # at the fork uncond and cond; behind it the values of skip's own input, too


@pytest.mark.parametrize("name", ["Wan T2V", "Wan FLF2V", "SkyReels-V2 I2V"])
def test_keys_and_values_of_text_and_image_are_computed_once_per_prompt(name):
    case = BY_NAME[name]
    transformer, (shared, cond, uncond) = case.model(torch.float32), case.inputs(2, torch.float32)
    attention, calls = transformer.blocks[2].attn2, []
    paths = ["to_k", "norm_k", "to_v", *([] if name == "Wan T2V" else ["add_k_proj", "norm_added_k", "add_v_proj"])]
    for path in paths:
        module = attention.get_submodule(path)
        module.forward = lambda x, path=path, forward=module.forward: calls.append(path) or forward(x)
    with Denoiser(transformer, EVERY_FORK) as denoiser:
        for step in range(3):
            denoiser.branches({**shared, "timestep": shared["timestep"] - step}, cond, uncond)
        assert denoiser.fusion.used.endswith("in 4 of 4 blocks")
    assert sorted(calls) == sorted(paths)


def test_modulation_is_read_from_one_copy_per_video(monkeypatch):
    tables = []

    def spy(x, scale=None, *args, **kwargs):
        tables.append(scale)
        return stg_kernels.norm_modulate(x, scale, *args, **kwargs)

    monkeypatch.setattr(wan, "norm_modulate", spy)
    case = BY_NAME["Wan TI2V"]
    with Denoiser(case.model(torch.float32), EVERY_FORK) as denoiser:
        denoiser.branches(*case.inputs(3, torch.float32))
    assert {len(scale) for scale in tables if scale is not None} == {3}
