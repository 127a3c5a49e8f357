"""STGGuidance in a modular pipeline against the passes apart, and as a guider that can be saved."""

import pytest
import torch
from engine.tiny import tiny_pipeline
from models.case import relative_error

from stg_engine import Denoiser, ScheduleEntry, Skip, STGConfig, STGGuidance, STGSchedule
from stg_engine.reference import passes_one_by_one

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


@pytest.fixture
def pipe():
    from diffusers.modular_pipelines import LTXAutoBlocks

    parts = tiny_pipeline().components
    pipe = LTXAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipe


def latents_of(pipe, guider, **arguments):
    pipe.update_components(guider=guider)
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**CALL, "generator": generator, **arguments}, output="latents")


class Apart(STGGuidance):
    """Every branch as a call of its own, combined by the formula."""

    def __init__(self, guidance_scale, config):
        super().__init__(guidance_scale, config)
        self.config_, self.calls = config, []

    def prepare_models(self, denoiser):
        model, inner = denoiser, type(denoiser).forward

        def forward(return_dict=False, **arguments):
            names = ("encoder_hidden_states", "encoder_attention_mask")
            shared = {k: v for k, v in arguments.items() if k not in names}
            cond = {k: arguments[k] for k in names}
            uncond = {k: self._prompts[k][1].to(arguments[k].dtype) for k in names}
            model.forward = lambda *a, **k: inner(model, *a, **k)
            b = passes_one_by_one(model, self.config_.skips, shared, cond, uncond if self.guidance_scale > 1 else None)
            model.forward = forward
            out = b["cond"] if "uncond" not in b else b["uncond"] + self.guidance_scale * (b["cond"] - b["uncond"])
            for name, skip in zip(("skip", "skip2"), self.config_.skips, strict=True):
                out = out + skip.scale * (b["cond"] - b[name])
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


def test_prompt_keys_are_computed_once(pipe):
    calls = []
    guider = STGGuidance(3.0, CONFIG)
    to_k = pipe.transformer.transformer_blocks[0].attn2.to_k
    to_k.forward = lambda x, inner=to_k.forward: (calls.append(1), inner(x))[1]  # below the engine's hook
    latents_of(pipe, guider)
    assert len(calls) == 1


def test_the_transformer_is_its_own_outside_the_guiders_steps(pipe):
    from engine.tiny import tiny_inputs

    shared, cond, _ = tiny_inputs()
    with torch.no_grad():
        plain = pipe.transformer(**shared, **cond, return_dict=False)[0]
        guider = STGGuidance(3.0, CONFIG)
        latents_of(pipe, guider)
        assert torch.equal(pipe.transformer(**shared, **cond, return_dict=False)[0], plain)


def test_a_schedule_takes_its_sigma_from_the_timestep(pipe):
    entries = (ScheduleEntry(0.9, (1,), 1.0), ScheduleEntry(0.2))
    guider = STGGuidance(3.0, STGConfig(schedule=STGSchedule(entries, "at_or_below")))
    assert latents_of(pipe, guider).isfinite().all()


def test_it_can_be_saved_and_copied(tmp_path):
    entries = (ScheduleEntry(0.9, (1,), 1.0, 0.5, 2.0), ScheduleEntry(0.2))
    for config in (CONFIG, None, STGConfig(schedule=STGSchedule(entries, "at_or_below"), cfg_star=True)):
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
    with Denoiser(pipe.transformer, CONFIG), pytest.raises(ValueError, match="has an Engine or a Denoiser on it"):
        latents_of(pipe, STGGuidance(3.0, CONFIG))
