"""STGGuidance in a modular pipeline against the passes apart, and as a guider that can be saved."""

from types import ModuleType

import pytest
import torch
from diffusers import WanPipeline
from diffusers.modular_pipelines import LTXAutoBlocks, Wan22Blocks, WanBlocks
from diffusers.video_processor import VideoProcessor
from engine.tiny import tiny_inputs, tiny_pipeline
from models.case import relative_error
from models.pipelines import wan

from stg_engine import Denoiser, ScheduleEntry, Skip, STGConfig, STGGuidance, STGSchedule
from stg_engine.config import AudioGuidance

CALL = {
    "prompt": "a red cat",
    "negative_prompt": "blurred",
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "max_sequence_length": 16,
    "output_type": "pt",
}
CONFIG = STGConfig(layers=(1,), scale=1.5, extra_skips=(Skip((2,), 0.5, "attention"),))


def modular(blocks, parts):
    pipe = blocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components})
    return pipe


@pytest.fixture
def pipe():
    return modular(LTXAutoBlocks, tiny_pipeline().components)


def wan_pipe(transformers=1):
    pipe = modular(
        (WanBlocks, Wan22Blocks)[transformers - 1], wan.build(WanPipeline, wan.unipc, transformers).components
    )
    pipe.update_components(video_processor=VideoProcessor(vae_scale_factor=8))
    return pipe


def latents_of(pipe, guider, guider_2=None, **arguments):
    pipe.update_components(guider=guider, **({} if guider_2 is None else {"guider_2": guider_2}))
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**CALL, "generator": generator, **arguments}, output="latents")


class Apart(STGGuidance):
    """Every branch as a call of its own, combined by the formula."""

    def __init__(self, guidance_scale, config):
        super().__init__(guidance_scale, config)
        self.config_, self.calls = config, []

    def prepare_models(self, denoiser):
        model, inner = denoiser, type(denoiser).forward

        blocks = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks

        def value(attention, args, kwargs, output):
            return attention.to_out[0](
                attention.to_v(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            )

        def weak(skip, arguments):
            modules = [blocks[layer] if skip.mode == "residual" else blocks[layer].attn1 for layer in skip.layers]
            given = {
                "residual": lambda block, a, k, out: k.get("hidden_states", a[0] if a else None),
                "attention": value,
            }
            hooks = [m.register_forward_hook(given[skip.mode], with_kwargs=True) for m in modules]
            (result,) = inner(model, **arguments, return_dict=False)
            for hook in hooks:
                hook.remove()
            return result

        def forward(return_dict=False, **arguments):
            (cond,) = inner(model, **arguments, return_dict=False)
            negative = {k: c_u[1].to(arguments[k].dtype) for k, c_u in self._prompts.items()}
            out = cond
            if self.guidance_scale > 1:
                (uncond,) = inner(model, **{**arguments, **negative}, return_dict=False)
                out = uncond + self.guidance_scale * (cond - uncond)
            for skip in self.config_.skips:
                out = out + skip.scale * (cond - weak(skip, arguments))
            return (out,)

        model.forward = forward

    def cleanup_models(self, denoiser):
        del denoiser.forward


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["cfg", "no_cfg"])
def test_latents_equal_those_of_passes_apart(pipe, guidance_scale):
    expected = latents_of(pipe, Apart(guidance_scale, CONFIG))
    guider = STGGuidance(guidance_scale, CONFIG)
    calls = []
    spy = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    actual = latents_of(pipe, guider)
    spy.remove()
    assert len(calls) == CALL["num_inference_steps"]
    assert relative_error(actual, expected) <= 2e-5
    guider.detach()
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("transformers", [1, 2], ids=["Wan 2.1", "Wan 2.2"])
def test_wan(transformers, monkeypatch):
    cleaner = ModuleType("ftfy")  # what mends a prompt's characters
    cleaner.fix_text = lambda text: text
    monkeypatch.setattr("diffusers.modular_pipelines.wan.encoders.ftfy", cleaner, raising=False)
    call = {"num_frames": 9, "num_inference_steps": 4}
    pipe = wan_pipe(transformers)
    more = (lambda kind: {"guider_2": kind(2.0, CONFIG)}) if transformers == 2 else (lambda kind: {})
    expected = latents_of(pipe, Apart(3.0, CONFIG), **more(Apart), **call)
    actual = latents_of(pipe, STGGuidance(3.0, CONFIG), **more(STGGuidance), **call)
    assert relative_error(actual, expected) <= 2e-5


def test_prompt_keys_are_computed_once(pipe):
    calls = []
    guider = STGGuidance(3.0, CONFIG)
    to_k = pipe.transformer.transformer_blocks[0].attn2.to_k
    to_k.forward = lambda x, inner=to_k.forward: (calls.append(1), inner(x))[1]  # below the engine's hook
    latents_of(pipe, guider)
    assert len(calls) == 1


def test_the_transformer_is_its_own_outside_the_guiders_steps(pipe):
    shared, cond, _ = tiny_inputs()
    with torch.no_grad():
        plain = pipe.transformer(**shared, **cond, return_dict=False)[0]
        guider = STGGuidance(3.0, CONFIG)
        latents_of(pipe, guider)
        assert torch.equal(pipe.transformer(**shared, **cond, return_dict=False)[0], plain)


def test_an_error_ends_the_guiders_step(pipe):
    shared, cond, _ = tiny_inputs()
    guider = STGGuidance(3.0, CONFIG)
    with torch.no_grad():
        plain = pipe.transformer(**shared, **cond)[0]
        guider.prepare_models(pipe.transformer)
        with pytest.raises(ValueError, match="return_dict=True is not allowed"):
            pipe.transformer(**shared, **cond)
        assert torch.equal(pipe.transformer(**shared, **cond)[0], plain)


def test_a_schedule_takes_its_sigma_from_the_timestep(pipe, monkeypatch):
    sigmas = []
    guided = Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda *a, **k: (sigmas.append(k["sigma"]), guided(*a, **k))[1])
    entries = (ScheduleEntry(0.9, (1,), 1.0), ScheduleEntry(0.2))
    guider = STGGuidance(3.0, STGConfig(schedule=STGSchedule(entries, "at_or_below")))
    latents_of(pipe, guider)
    assert sigmas == pytest.approx(pipe.scheduler.sigmas[:-1].tolist())
    assert len(set(sigmas)) == CALL["num_inference_steps"]


def test_it_can_be_saved_and_copied(tmp_path):
    entries = (ScheduleEntry(0.9, (1,), 1.0, 0.5, 2.0), ScheduleEntry(0.2))
    scheduled = STGConfig(schedule=STGSchedule(entries, "at_or_below"), cfg_star=True)
    audio = STGConfig(layers=(1,), modality_scale=3.0, audio=AudioGuidance(guidance_scale=7.0, modality_scale=2.0))
    for config in (CONFIG, None, scheduled, audio):
        guider = STGGuidance(4.0, config, execution="serial")
        guider.save_pretrained(tmp_path)
        for other in (STGGuidance.from_pretrained(tmp_path), guider.new()):
            assert (other.stg, other.guidance_scale) == (config, 4.0)
            assert other.config["execution"] == "serial"
        assert guider.new(guidance_scale=2.0).guidance_scale == 2.0


def test_errors(pipe):
    with pytest.raises(ValueError, match="guidance_scale=-1"):
        STGGuidance(-1, CONFIG)
    with pytest.raises(ValueError, match=r"layers=\(9,\)"):
        latents_of(pipe, STGGuidance(3.0, STGConfig(layers=(9,))))
    with (
        Denoiser(pipe.transformer, CONFIG),
        pytest.raises(ValueError, match="has an Engine or a Denoiser on it"),
    ):
        latents_of(pipe, STGGuidance(3.0, CONFIG))
