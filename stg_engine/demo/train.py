"""Train the shipped model: `python -m stg_engine.demo.train {vae,transformer,export} --workdir DIR`.

The three commands run in this order. Each can be stopped at any time and continues when it is run again.
"""

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from stg_engine.demo import model_path
from stg_engine.demo.data import FRAMES, HEIGHT, WIDTH, clips, random_spec, random_specs
from stg_engine.demo.networks import (
    MAX_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    encode,
    set_latent_statistics,
)
from stg_engine.demo.training import fit, save_atomically

EMPTY_PROMPT_SHARE = 0.12
LATENT_NOISE = 0.05
#: Of the logit of sigma: high noise decides where the shape is and which way it goes (see `build_scheduler`).
SIGMA_MEAN, SIGMA_STD = 1.5, 1.2
#: LTXPipeline's default and the demo's; RoPE depends on it.
FRAME_RATES = (25, 8)
_LONGEST_CAPTION = 20  # tokens; keys behind it are padding in every caption, which the mask hides exactly


def train_vae(workdir: Path, steps: int, batch: int, lr: float, seed: int, **options: Any) -> None:
    """Train the autoencoder and write it, with the statistics of its latents, to `workdir/vae`."""
    torch.manual_seed(seed)
    vae = build_vae()

    def loss(step: int) -> Tensor:
        rng = random.Random(f"vae {seed} {step}")
        target = clips([random_spec(rng) for _ in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(target).latent_dist.mode().float()
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            output = vae.decode(noisy).sample.float()
        error = output - target
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
        # the noise keeps the decoder smooth in the latents, the last term keeps the encoder from outgrowing it
        return error.abs().mean() + edges + 4 * error.square().mean() + 1e-4 * latents.square().mean()

    vae = fit(vae, loss, workdir / "vae.pt", steps=steps, lr=lr, seed=seed, **options).eval()
    specs = random_specs(seed + 1)
    with torch.no_grad():
        raw = [vae.encode(clips([next(specs) for _ in range(16)])).latent_dist.mode() for _ in range(64)]
    set_latent_statistics(vae, torch.cat(raw))
    vae.save_pretrained(workdir / "vae")


def latent_set(workdir: Path, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """`count` clips as normalised packed latents (bfloat16 [N, S, C]) and their captions, cached in `workdir`."""
    path = workdir / f"latents-{count}-{seed}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["latents"], saved["captions"]
    vae = AutoencoderKLLTXVideo.from_pretrained(workdir / "vae").eval()
    specs = random_specs(seed + 2)
    captions: list[str] = []
    latents: list[Tensor] = []
    with tqdm(total=count, desc="latents", dynamic_ncols=True, mininterval=10) as bar:
        while len(captions) < count:
            chosen = [next(specs) for _ in range(min(32, count - len(captions)))]
            captions += [spec.caption for spec in chosen]
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(encode(vae, clips(chosen)).bfloat16())
            bar.update(len(chosen))
    saved = {"latents": torch.cat(latents), "captions": captions}
    save_atomically(saved, path)
    return saved["latents"], captions


class TextAndTransformer(nn.Module):
    """The text encoder and the transformer, trained together."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.transformer = build_transformer(**changes)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, frame_rate: int) -> Tensor:
        """Velocity for noisy latents [B, S, C] at sigma [B], given padded token ids [B, T]."""
        # as LTXPipeline does it: the text encoder sees the padding, cross-attention does not
        text = self.text_encoder(tokens)[0][:, :_LONGEST_CAPTION]
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            timestep=sigma * 1000,
            encoder_attention_mask=(tokens != 0)[:, :_LONGEST_CAPTION],
            num_frames=(FRAMES - 1) // 2 + 1,
            height=HEIGHT // 16,
            width=WIDTH // 16,
            rope_interpolation_scale=(2 / frame_rate, 16, 16),
            return_dict=False,
        )[0]


def train_transformer(
    workdir: Path, steps: int, batch: int, lr: float, seed: int, count: int, compiled: bool = False, **options: Any
) -> TextAndTransformer:
    """Train text encoder and transformer by flow matching on latents of `count` clips; returns the averaged pair."""
    latents, captions = latent_set(workdir, count, seed)
    tokenizer = build_tokenizer()
    padded = {"padding": "max_length", "max_length": MAX_TOKENS, "return_tensors": "pt"}
    tokens = tokenizer(captions, **padded).input_ids
    empty = tokenizer([""], **padded).input_ids
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # also means the CPU's math attention
    torch.manual_seed(seed)
    model = TextAndTransformer()
    if compiled:
        for block in model.transformer.transformer_blocks:
            block.compile()

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(latents), (batch,))
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        sigma = (SIGMA_MEAN + SIGMA_STD * torch.randn(batch)).sigmoid()
        drop = torch.rand(batch, 1) < EMPTY_PROMPT_SHARE
        length = (32, 64, MAX_TOKENS)[step % 3]  # max_sequence_length is the caller's choice
        prompt = torch.where(drop, empty, tokens[chosen])[:, :length]
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        # the fused kernel's backward takes 1.8 s of a 2.4 s step on the CPU, plain matrix products 0.3 s
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(noisy, sigma, prompt, FRAME_RATES[step % 2]).float()
        return (velocity - (noise - clean)).square().mean()

    return fit(model, loss, workdir / "transformer.pt", steps=steps, lr=lr, seed=seed, **options)


def export(workdir: Path, out: Path) -> None:
    """Write the pipeline, from the last checkpoint in `workdir`, to the folder `out`; replaces a folder there."""
    model = TextAndTransformer()
    saved = torch.load(workdir / "transformer.pt", weights_only=True)
    model.load_state_dict(saved["average"])
    vae = build_vae()  # a loaded one would write the name of its folder into the config
    vae.load_state_dict(AutoencoderKLLTXVideo.from_pretrained(workdir / "vae").state_dict())
    pipe = LTXPipeline(
        scheduler=build_scheduler(),
        vae=vae.bfloat16(),
        # transformers loads the stored dtype while diffusers loads float32, and the two must meet
        text_encoder=model.text_encoder.float(),
        tokenizer=build_tokenizer(),
        transformer=model.transformer.bfloat16(),
    )
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    print(f"step {saved['step']} -> {out}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stg_engine.demo.train", description=__doc__)
    parser.add_argument("command", choices=("vae", "transformer", "export"))
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--steps", type=int, help="default: vae 2450, transformer 3000")
    parser.add_argument("--batch", type=int, help="default: vae 8, transformer 32")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=24_000, help="training clips of the transformer")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks (1.3x faster)")
    parser.add_argument("--out", type=Path, default=model_path(), help="folder that export writes")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.command == "vae":
        train_vae(args.workdir, args.steps or 2450, args.batch or 8, args.lr, args.seed)
    elif args.command == "transformer":
        options = {"count": args.clips, "compiled": args.compile}
        train_transformer(args.workdir, args.steps or 3000, args.batch or 32, args.lr, args.seed, **options)
    else:
        export(args.workdir, args.out)


if __name__ == "__main__":
    main()
