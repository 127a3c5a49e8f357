"""The community STG pipelines of diffusers against the engine, one prompt each: relative difference of the latents.

    python tests/peers/community.py <checkout of diffusers>

Those that do not run on the installed diffusers are named with their error. Exit status 1 if one runs and differs.
"""

import argparse
import contextlib
import importlib.util
import inspect
import io
import os
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(HERE.parent))

BOUND = 2e-5  # float32, three steps; tests/models/test_pipelines.py has the same
PEERS = {  # file: (class, pipeline case, whether it has an uncond pass)
    "pipeline_stg_ltx": ("LTXSTGPipeline", "LTXPipeline", True),
    "pipeline_stg_mochi": ("MochiSTGPipeline", "MochiPipeline", True),
    "pipeline_stg_wan": ("WanSTGPipeline", "WanPipeline", True),
    "pipeline_stg_cogvideox": ("CogVideoXSTGPipeline", "CogVideoXPipeline", True),
    "pipeline_stg_hunyuan_video": ("HunyuanVideoSTGPipeline", "HunyuanVideoPipeline", False),
}
LAYER, SCALE = 1, 1.5


def community(folder: Path, file: str, kind: str):
    spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kind)


def known(pipe, call: dict) -> dict:
    return {name: value for name, value in call.items() if name in inspect.signature(pipe.__call__).parameters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    folder = parser.parse_args().checkout / "examples/community"

    from engine.tiny import CALL, tiny_pipeline
    from models.case import relative_error
    from models.pipeline_case import PipelineCase, pipeline_cases

    import stg_engine

    cases = {case.name: case for case in pipeline_cases()}
    cases["LTXPipeline"] = PipelineCase("LTXPipeline", tiny_pipeline, None, CALL)
    differing = 0
    mends_text = types.ModuleType("ftfy")  # Wan's pipelines import it where it is installed
    mends_text.fix_text = lambda text: text
    sys.modules.setdefault("ftfy", mends_text)
    for file, (kind, name, is_guided) in PEERS.items():
        case, pipe = cases[name], cases[name].build()
        with stg_engine.attach(pipe, stg_engine.STGConfig(layers=(LAYER,), scale=SCALE)):
            ours = case.latents(pipe, guided=is_guided)
        plain = case.latents(pipe, guided=is_guided)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                peer = community(folder, file, kind)
                takes = inspect.signature(peer.__init__).parameters
                pipe = peer(**{key: part for key, part in case.build().components.items() if key in takes})
                pipe.set_progress_bar_config(disable=True)
                stg = {"stg_applied_layers_idx": [LAYER], "stg_scale": SCALE}
                theirs = case.latents(lambda pipe=pipe, **call: pipe(**known(pipe, call)), guided=is_guided, **stg)
        except Exception as error:
            print(f"{kind:26} does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        error, effect = relative_error(ours, theirs), relative_error(plain, theirs)
        is_equal = error <= BOUND < effect
        differing += not is_equal
        print(f"{kind:26} {'equal' if is_equal else 'DIFFERS'}: {error:.1e}, without STG {effect:.1e}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
