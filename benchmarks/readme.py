"""Write the generated parts of the docs: `python -m benchmarks.readme`; `--check` compares, exit status 1 if stale.

Each part stands between `<!-- NAME -->` and `<!-- /NAME -->`. Costs come from `stg_engine.plan`, times from the CSV.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import plots, record, speed
from stg_engine import Plan, Skip, STGConfig
from stg_engine.bench import sweep_output
from stg_engine.bench.sweep import SweepRow
from stg_engine.calls import PIPELINES
from stg_engine.config import StepGuidance
from stg_engine.conventions import CONVENTIONS
from stg_engine.models import supported
from stg_engine.plan import build_plans
from stg_engine.presets import PRESETS

ROOT = Path(__file__).parents[1]
BASELINES = {"diffusers": "diffusers", "eager": "reference"}

# model, blocks, published skip, uncond branch
PUBLISHED = [
    ("LTX-Video 2B", 28, Skip((19,)), True),
    ("LTX-Video 2B, attention skip", 28, Skip((19,), mode="attention"), True),
    ("LTX-Video 13B, second pass, no CFG", 48, Skip((27,), mode="attention"), False),
    ("Mochi", 48, Skip((34,)), True),
    ("CogVideoX-5B", 42, Skip((11,)), True),
    ("CogVideoX-2B", 30, Skip((11,)), True),
    ("Wan 2.1 1.3B", 30, Skip((8,)), True),
    ("Wan 2.1 14B", 40, Skip((8,)), True),
    ("HunyuanVideo, no CFG", 60, Skip((2,)), False),
]
STEPS_13B = (1, 2, 2, 5, 4, 5, 8)
"""Executed steps per entry of the "ltx-video-13b" schedule, 27 in all (tests/engine/test_config.py)."""


def plan_picture() -> str:
    return f"```\n{Plan.build(STGConfig.preset('ltx-video-2b'), 28)}\n```"


def cost_table() -> str:
    rows = []
    for model, blocks, skip, uncond in PUBLISHED:
        plan = Plan.build(StepGuidance((skip,)), blocks, uncond=uncond)
        layers = f"{', '.join(map(str, skip.layers))} of {blocks}"
        rows.append((model, layers, 1 + uncond, len(plan.branches) * blocks, plan.block_rows, blocks))
    schedule = build_plans(STGConfig.preset("ltx-video-13b"), 48)
    full = sum(n * len(plan.branches) * 48 for n, plan in zip(STEPS_13B, schedule, strict=True))
    shared = sum(n * plan.block_rows for n, plan in zip(STEPS_13B, schedule, strict=True))
    unskipped = [sum(not branch.skips for branch in plan.branches) for plan in schedule]
    plain = sum(n * count for n, count in zip(STEPS_13B, unskipped, strict=True))
    rows.insert(2, ("LTX-Video 13B, first pass, 27 steps", "schedule", plain, full, shared, 48))
    lines = ["| model | layers skipped | without STG | STG, passes apart | STG, shared | bound |"]
    lines.append("|---|---|---|---|---|---|")
    for model, layers, plain, apart, shared, blocks in rows:
        cost = f"{plain:.2f} | {apart / blocks:.2f} | {shared / blocks:.2f} | {apart / shared:.2f}x"
        lines.append(f"| {model} | {layers} | {cost} |")
    return "\n".join(lines)


def speed_part() -> str:
    return speed.speed_tables(record.read(record.STEPS, record.StepRow))


def goals_part() -> str:
    return speed.goals_table(record.read(record.STEPS, record.StepRow))


def ops_table() -> str:
    """Each op with three rows: the first of `record.BASELINES` of the same commit against the implementation in use."""
    lines = ["| op | model | dtype | baseline | its time | stg_kernels | ratio | of copy speed | measured on |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    rows = [row for row in record.read(record.RESULTS / "ops.csv", record.OpRow) if row.rows == 3]
    latest = {(row.op, row.model, row.dtype, row.device, row.threads, row.implementation): row for row in rows}
    for key, row in latest.items():
        candidates = (latest.get((*key[:-1], name)) for name in record.BASELINES)
        baseline = next((other for other in candidates if other is not None and other.commit == row.commit), None)
        if row.implementation not in ("native", "fused") or baseline is None:
            continue
        times = f"{baseline.seconds * 1e3:.2f} ms | {row.seconds * 1e3:.2f} ms | {baseline.seconds / row.seconds:.1f}x"
        where = f"{row.device}, {row.threads} thread{'s' * (row.threads > 1)}, commit {row.commit}"
        copy = f"{row.gb_per_second / row.copy_gb_per_second:.2f}"
        case = f"`{row.op}` | {row.model} | {row.dtype} | {BASELINES[baseline.implementation]}"
        lines.append(f"| {case} | {times} | {copy} | {where} |")
    return "\n".join(lines)


def attention_table() -> str:
    """Each case with three rows on a CUDA device: what `branch_attention` runs against torch's SDPA."""
    rows = record.read(record.RESULTS / "attention.csv", record.AttentionRow)
    latest = {
        (r.case, r.model, r.dtype, r.device, r.backend.split(" ")[0]): r
        for r in rows
        if record.is_cuda(r) and r.rows == 3
    }
    lines = ["| case | model | dtype | SDPA | `branch_attention` | ratio | backend | of matmul speed | measured on |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for key, row in latest.items():
        if key[-1] != "dispatch:":
            continue
        sdpa = latest.get((*key[:-1], "sdpa"))
        plain, ratio = (f"{sdpa.seconds * 1e3:.2f} ms", f"{sdpa.seconds / row.seconds:.2f}x") if sdpa else ("none", "")
        backend, of_matmul = row.backend.removeprefix("dispatch: "), f"{row.tflops / row.matmul_tflops:.2f}"
        times = f"{plain} | {row.seconds * 1e3:.2f} ms | {ratio}"
        where = f"{row.device}, commit {row.commit}"
        lines.append(f"| {row.case} | {row.model} | {row.dtype} | {times} | {backend} | {of_matmul} | {where} |")
    return "\n".join(lines) if len(lines) > 2 else speed.NO_CUDA


SKIPS = {
    "value_passthrough": "V",
    "gated_value_passthrough": "V, gated",
    "own_key_attention": "own key and text",
}
"""What a token gets of attention in mode="attention", by the name of the family's `attention_skip`."""


GUIDED = {
    "LTXVideoTransformer3DModel": "modular LTX",
    "WanTransformer3DModel": "modular Wan",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo15",
}
"""What takes an `STGGuidance`: tests/models/test_guider.py, test_hunyuan_pipelines.py."""


def support_table() -> str:
    """The registered families. Each yes is a test over all of them in tests/models or tests/engine/test_graphs.py."""
    import diffusers

    pipelines: dict[str, list[str]] = {}
    for name in PIPELINES:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        model = next(str(parameters[key].annotation) for key in ("transformer", "unet") if key in parameters)
        (kind,) = {spec.transformer for spec in supported() if re.search(rf"\b{spec.transformer}\b", model)}
        pipelines.setdefault(kind, []).append(name.removesuffix("Pipeline"))
    for kind, name in GUIDED.items():
        pipelines.setdefault(kind, []).append(f"{name} with a guider")
    lines = [
        "| model | attention skip gives | axes | pipelines | fused blocks | serial | LoRA | offload | CUDA graph |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for spec in (spec for spec in supported() if hasattr(diffusers, spec.transformer)):
        axes = ", ".join(filter(None, spec.axes)) or "-"
        hosts = ", ".join(pipelines.get(spec.transformer, ("`Denoiser` alone",)))
        lora = "yes" if hasattr(getattr(diffusers, spec.transformer), "add_adapter") else "no"
        skip = SKIPS[spec.attention_skip.__name__]
        fused = "no" if spec.fused is None else "yes"
        if spec.fused is not None and hasattr(import_module(f"stg_engine.fused.{spec.fused}"), "ATTENTION_ALONE"):
            fused = "attention"
        graph = {"": "yes", "blocks": "fused blocks", "forward": "no"}[spec.waits_in]
        cells = (spec.family, skip, axes, hosts, fused, "yes", lora, "yes", graph)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def presets_table() -> str:
    lines = ["| preset | for | skips | combines as | published with | source |", "|---|---|---|---|---|---|"]
    for preset in PRESETS.values():
        spec = next((spec for spec in supported() if spec.transformer == preset.transformer), None)
        is_default = spec is not None and spec.presets.get(preset.blocks) == preset.name
        name = f"**`{preset.name}`**" if is_default else f"`{preset.name}`"
        model = f"{'Open-Sora' if spec is None else spec.family}, {preset.blocks} layers"
        skips = "; ".join(_skip(skip) for skip in preset.config.skips)
        skips = f"schedule: {skips}" if preset.config.schedule is not None else skips
        note = f"guidance {preset.guidance_scale:g}, {preset.note}"
        lines.append(f"| {name} | {model} | {skips} | `{preset.convention}` | {note} | {preset.source} |")
    return "\n".join(lines)


def _skip(skip: Skip) -> str:
    axis = "" if skip.axis is None else f" {skip.axis}"
    return f"{skip.mode}{axis} {', '.join(map(str, skip.layers))} at {skip.scale:g}"


def conventions_table() -> str:
    lines = ["| name | fields | what it is | source |", "|---|---|---|---|"]
    for convention in CONVENTIONS.values():
        fields = ", ".join(f"{name}={value!r}" for name, value in convention.fields.items())
        lines.append(f"| `{convention.name}` | `{fields}` | {convention.note} | {convention.source} |")
    return "\n".join(lines)


def sweep_table() -> str:
    return f"```\n{sweep_output.table(record.read(record.RESULTS / 'sweep.csv', SweepRow))}\n```"


PARTS = {
    "support": support_table,
    "plan": plan_picture,
    "cost": cost_table,
    "speed": speed_part,
    "goals": goals_part,
    "ops": ops_table,
    "attention": attention_table,
    "sweep": sweep_table,
}
MODELS_PARTS = {"presets": presets_table, "conventions": conventions_table}
PAGES = {ROOT / "README.md": PARTS, ROOT / "docs/models.md": MODELS_PARTS}


def generated(page: Path) -> str:
    """The page's text with every part written anew."""
    text = page.read_text()
    for name, write in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        part = f"\\1{write()}\n\\2"
        text, count = re.subn(pattern, part, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page.name} has {count} parts named {name!r}; it must have one")
    return text


def main() -> int:
    pages = {page: generated(page) for page in PAGES}
    if "--check" in sys.argv[1:]:
        stale = plots.stale(record.read(record.STEPS, record.StepRow))
        stale += [page.name for page, text in pages.items() if page.read_text() != text]
        for name in stale:
            print(f"{name} is not what code and CSV say: run `make readme`")
        return int(bool(stale))
    for page, text in pages.items():
        temporary = page.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
