"""Pretrain a small CLIP on pictures and sentences, without any mask.

    python examples/make_brains.py Colin27 --captions 1000
    python examples/pretrain_clip.py --data data/Colin27_captions --output runs/clip
    python examples/train.py --backbone runs/clip --data data/Colin27_subjects --recipe brains

A folder of data holds captions.jsonl: a line for each picture, {"image": path, "whole": [sentences about the picture as
a whole], "texts": [sentences about something in it]}, and perhaps "subject" (who is held out) and "present" (for a
score). A sentence of `texts` counts as untrue of every picture that does not list it.

Four losses, each of which can be left out:

- open_clip's own contrastive loss of picture and sentence (`--loss siglip` for its sigmoid one);
- the same question asked of patches: each sentence of `texts` is compared with the patches that are most like it, to
  tell true ones from untrue ones (sigmoid loss with all true pairs of the batch). It keeps patches apart, which a loss
  on the class token alone does not;
- patch tokens are to fill all of their channels, each with its own content (variance and covariance of VICReg, Bardes
  et al. 2022, arXiv 2105.04906): contrastive losses alone leave tokens of a few dimensions;
- hidden patches, up to half of them, are to be painted again from what is left (masked-image modelling). It keeps the
  grey levels in the tokens, which a head needs that is to draw outlines.

Pictures are shown as other scanners might have taken them: with another contrast or the opposite one, unevenly lit,
with noise, less sharp. Patches are to be painted as they were before.

Randomness follows from seed and step, so --resume continues a killed run exactly. Writes to --output an open_clip
folder (open_clip_config.json, open_clip_model.safetensors), log.jsonl, scores.json; checkpoint.pt until it is finished.

Cost and score: see docs/studies.md.

Shape alphabet: B batch, N patches, J sentences of a batch, L text tokens, D joint width.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = line.add_argument
    add("--data", type=Path, default=Path("data/Colin27_captions"), help="(%(default)s)")
    add("--model", default="small-patch-16", help="architecture: in backbones/, or of open_clip (%(default)s)")
    add("--loss", choices=("clip", "siglip"), default="clip", help="of open_clip (%(default)s)")
    add("--contrastive", type=float, default=1.0, help="weight of that loss (%(default)s)")
    add("--local", type=float, default=1.0, help="weight of the same question asked of patches (%(default)s)")
    add("--spread", type=float, default=1.0, help="weight of patch tokens filling their channels (%(default)s)")
    add("--paint", type=float, default=1.0, help="weight of painting hidden patches (%(default)s)")
    add("--hidden", type=float, default=0.5, help="largest part of the patches that is hidden (%(default)s)")
    add("--sentences", type=int, default=1, help="of `texts` that are drawn for each picture and step (%(default)s)")
    add("--image-lr", type=float, default=1.0, help="of the image tower's blocks, as a part of --lr (%(default)s)")
    add("--steps", type=int, default=4000, help="(%(default)s)")
    add("--batch-size", type=int, default=64, help="(%(default)s)")
    add("--lr", type=float, default=1e-3, help="of AdamW; a cosine after 5%% of warm-up (%(default)s)")
    add("--held-out", type=int, default=10, help="of so many subjects one is held out for the scores (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--checkpoint-every", type=int, default=500, help="steps (%(default)s)")
    add("--output", type=Path, default=Path("runs/clip"), help="(%(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --output, exactly")
    args = line.parse_args(argv)
    if (args.output / "checkpoint.pt").exists() != args.resume:
        problem = "has no checkpoint; start without" if args.resume else "has a checkpoint already; continue with"
        line.error(f"{args.output} {problem} --resume, or give another --output")
    for option in ("steps", "batch_size", "lr", "sentences", "held_out"):
        if not getattr(args, option) > 0:
            line.error(f"--{option.replace('_', '-')} is {getattr(args, option)}, expected a number above 0")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the imports that take seconds

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm


class Captions:
    """Pictures and sentences in memory.

    Attributes:
        images: uint8, [pictures, 3, H, W], at the network's size.
        tokens: [sentences, L], of `sentences`.
        true: bool, [pictures, sentences]: which sentences are listed in `texts`.
        whole: For each picture, the tokens of its sentences about it as a whole, [n, L].
        held_out: Numbers of the pictures that are kept for the scores; `train` are the others.
    """

    def __init__(self, folder: Path, *, size: tuple[int, int], tokenizer: Any, held_out: int) -> None:
        lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        self.lines = [line for line in lines if line["texts"] and line["whole"]]
        pictures = [Image.open(folder / line["image"]).convert("RGB") for line in self.lines]
        shrunk = [picture.resize(size[::-1], Image.Resampling.BICUBIC) for picture in pictures]
        self.images = torch.stack([torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in shrunk])
        self.images = rearrange(self.images, "n (h w c) -> n c h w", h=size[0], c=3)
        self.sentences = sorted({text for line in self.lines for text in line["texts"]})
        number = {text: at for at, text in enumerate(self.sentences)}
        self.tokens = tokenizer(self.sentences)
        self.true = torch.zeros(len(self.lines), len(self.sentences), dtype=torch.bool)
        for at, line in enumerate(self.lines):
            self.true[at, [number[text] for text in line["texts"]]] = True
        self.whole = [tokenizer(line["whole"]) for line in self.lines]
        subjects = [line.get("subject", at) for at, line in enumerate(self.lines)]
        last = set(sorted(set(subjects))[held_out - 1 :: held_out])
        self.held_out = [at for at, subject in enumerate(subjects) if subject in last]
        self.train = [at for at, subject in enumerate(subjects) if subject not in last]


class Step(NamedTuple):
    """What a step needs besides the pictures' numbers."""

    whole: Tensor  # [B, L], a sentence about each picture
    sentences: Tensor  # [J], numbers of the sentences that are asked of all patches
    hidden: Tensor  # bool, [B, N], the patches that are hidden
    shown: Tensor  # uint8, [B, 3, H, W], the pictures as another scanner might have taken them


class Pretrainer(nn.Module):
    """A CLIP with what is only needed to pretrain it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        torch.manual_seed(args.seed)
        open_clip.add_model_config(HERE / "backbones")
        siglip = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0} if args.loss == "siglip" else {}
        self.clip = open_clip.create_model(args.model, **siglip)
        # At the size that train.py gives to random ones, so that adapters meet tokens of the same size.
        for embedding in (self.clip.token_embedding.weight, self.clip.positional_embedding):
            nn.init.normal_(embedding)
        nn.init.normal_(self.clip.visual.positional_embedding)
        visual = self.clip.visual
        visual.output_tokens = True
        self.patch = visual.patch_size
        self.painter = nn.Linear(visual.conv1.out_channels, 3 * self.patch[0] * self.patch[1])
        self.local_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.local_bias = nn.Parameter(torch.tensor(-5.0))
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))
        self.contrast = (ClipLoss if args.loss == "clip" else SigLipLoss)()

    def encode_image(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, D] and patches [B, N, D], both of length 1, and patches before their projection, [B, N, C].

        Args:
            images: uint8, [B, 3, H, W].
            hidden: bool, [B, N].
        """
        pixels = self.pixels(images)
        if hidden is not None:
            pixels = pixels.masked_fill(hidden[..., None], 0.0)
        grid = images.shape[-2] // self.patch[0]
        back = "b (y x) (c p q) -> b c (y p) (x q)"
        pictures = rearrange(pixels, back, y=grid, p=self.patch[0], q=self.patch[1])
        pooled, tokens = self.clip.visual(pictures)
        return F.normalize(pooled, dim=-1), F.normalize(tokens @ self.clip.visual.proj, dim=-1), tokens

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised pixels of each patch, [B, N, 3 P P]."""
        cfg = open_clip.get_model_preprocess_cfg(self.clip)
        mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
        normal = (images / 255.0 - mean) / std
        return rearrange(normal, "b c (y p) (x q) -> b (y x) (c p q)", p=self.patch[0], q=self.patch[1])

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Embeddings, [J, D], of length 1 or as they come; the padding behind the longest sentence is left out."""
        clip = self.clip
        length = int((tokens != 0).sum(dim=1).max())
        tokens = tokens[:, :length]
        hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]  # [J, L, C]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        last = hidden[torch.arange(len(tokens)), tokens.argmax(dim=1)]  # [J, C]
        embeds = last @ clip.text_projection
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def local_logits(self, patches: Tensor, sentences: Tensor) -> Tensor:
        """Logits that a sentence is true of a picture, [B, J]: its likeness with the patches that are most like it."""
        alike = torch.einsum("bnd,jd->bjn", patches, sentences)
        pooled = (alike * (alike * self.sharpness.exp()).softmax(dim=-1)).sum(dim=-1)  # [B, J]
        return pooled * self.local_scale.exp() + self.local_bias

    def forward(self, images: Tensor, true: Tensor, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """The weighted losses by name; `true` is [B, J], `tokens` are those of the step's sentences, [J, L]."""
        args, losses = self.args, {}
        pooled, patches, hidden = self.encode_image(step.shown, step.hidden)
        if args.contrastive:
            scale = {"logit_scale": self.clip.logit_scale.exp().clamp(max=100.0)}
            if args.loss == "siglip":
                scale["logit_bias"] = self.clip.logit_bias
            losses["contrastive"] = args.contrastive * self.contrast(pooled, self.encode_text(step.whole), **scale)
        if args.local:
            logits = self.local_logits(patches, self.encode_text(tokens))
            each = F.binary_cross_entropy_with_logits(logits, true.float(), reduction="sum")
            losses["local"] = args.local * each / true.sum()
        if args.spread:
            losses["spread"] = args.spread * narrowness(hidden.flatten(0, 1))
        if args.paint:
            missed = (self.painter(hidden) - self.pixels(images)).square().mean(dim=-1)  # [B, N]
            weight = 0.2 + step.hidden  # those in sight count a little
            losses["paint"] = args.paint * (missed * weight).sum() / weight.sum()
        return losses


def narrowness(tokens: Tensor) -> Tensor:
    """How far the channels of tokens [n, C] are from a standard deviation of 1, and from telling each its own."""
    centred = tokens - tokens.mean(dim=0)
    covariance = centred.mT @ centred / (len(tokens) - 1)  # [C, C]
    variance = covariance.diagonal()
    correlated = covariance.square().sum() - variance.square().sum()
    return F.relu(1.0 - (variance + 1e-4).sqrt()).mean() + 0.04 * correlated / len(variance)  # as VICReg's


def draw_step(data: Captions, args: argparse.Namespace, step: int, patches: int) -> tuple[list[int], Step]:
    """The pictures of a step and what is asked of them; it follows from seed and step alone."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    chosen = torch.randperm(len(data.train), generator=generator)[: args.batch_size]
    numbers = [data.train[at] for at in chosen]
    drawn = [data.true[at].float().multinomial(args.sentences, replacement=True, generator=generator) for at in numbers]
    whole = [data.whole[at][torch.randint(len(data.whole[at]), (), generator=generator)] for at in numbers]
    share = args.hidden * torch.rand(len(numbers), 1, generator=generator)
    hidden = torch.rand(len(numbers), patches, generator=generator) < share
    shown = another_scanner(data.images[numbers], generator)
    return numbers, Step(torch.stack(whole), torch.cat(drawn).unique(), hidden, shown)


def another_scanner(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture, uint8 [B, 3, H, W], with faults of random strength: half of them with each of five."""
    draw = lambda *size: torch.rand(len(images), *size, generator=generator)  # noqa: E731
    whether = lambda: (draw(1, 1, 1) < 0.5).float()  # noqa: E731
    grey, tissue = images.float() / 255.0, (images > 5).float()
    low = F.interpolate(F.interpolate(grey, scale_factor=1 / 3, mode="area"), grey.shape[-2:], mode="bilinear")
    grey = grey.lerp(low, whether() * draw(1, 1, 1))
    grey = grey.clamp(0.0, 1.0) ** torch.exp(whether() * (2.0 * draw(1, 1, 1) - 1.0))  # gamma of 0.37 to 2.7
    brightest = grey.amax(dim=(1, 2, 3), keepdim=True)
    grey = torch.where(whether() * whether() > 0, (brightest - grey) * tissue, grey)
    field = F.interpolate(2.0 * draw(1, 4, 4) - 1.0, grey.shape[-2:], mode="bicubic")
    grey = grey * torch.exp(0.5 * whether() * field)
    noise = torch.randn(len(images), 1, *grey.shape[-2:], generator=generator)
    grey = grey + 0.15 * whether() * draw(1, 1, 1) * noise
    return (255.0 * grey.clamp(0.0, 1.0)).round().to(torch.uint8)


@torch.no_grad()
def score(model: Pretrainer, data: Captions) -> dict[str, float]:
    """Zero-shot scores on the pictures that are held out.

    recall@1 and @5: a picture's own sentence is found among those of all; chance is 1 and 5 in as many.
    true_auroc, true_accuracy: sentences about something are told true from untrue; accuracy is balanced.
    presence_auroc, presence_accuracy: likewise "the NAME", for the structures of `present`.
    """
    model.eval()
    at = data.held_out
    parts = [model.encode_image(data.images[part])[:2] for part in torch.tensor(at).split(256)]
    pooled, patches = (torch.cat(each) for each in zip(*parts, strict=True))
    whole = model.encode_text(torch.stack([data.whole[number][0] for number in at]))
    rank = (pooled @ whole.mT).argsort(dim=1, descending=True).argsort(dim=1).diagonal()
    scores = {"pictures": len(at), **{f"recall@{k}": float((rank < k).float().mean()) for k in (1, 5)}}
    texts = data.true[at].any(dim=0).nonzero()[:, 0]
    names = {"the " + name for number in at for name in data.lines[number].get("present", ())}
    asked = {"true": texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:500]]}
    asked["presence"] = torch.tensor([i for i, text in enumerate(data.sentences) if text in names], dtype=torch.long)
    for what, numbers in asked.items():
        truth = data.true[at][:, numbers]
        if truth.all() or not truth.any():
            continue
        logits = model.local_logits(patches, model.encode_text(data.tokens[numbers]))
        scores[f"{what}_auroc"] = float(binary_auroc(logits.flatten(), truth.flatten().int()))
        said = logits > 0
        rates = [(said == truth)[truth == value].float().mean() for value in (True, False)]
        scores[f"{what}_accuracy"] = float(sum(rates) / 2)
    return {name: round(value, 4) for name, value in scores.items()}


def parameter_groups(model: Pretrainer) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay; what is not to be trained is frozen and in none."""
    args, groups = model.args, []
    image = {
        f"clip.visual.{name}"
        for name, _ in model.clip.visual.named_parameters()
        if not name.startswith(("proj", "ln_post"))
    }
    for part in (True, False):
        lr = args.lr * (args.image_lr if part else 1.0)
        own = [each.requires_grad_(lr > 0) for name, each in model.named_parameters() if (name in image) == part]
        if lr > 0:
            groups += [{"params": [each for each in own if each.ndim >= 2], "lr": lr, "weight_decay": 0.05}]
            groups += [{"params": [each for each in own if each.ndim < 2], "lr": lr, "weight_decay": 0.0}]
    return groups


@torch.no_grad()
def save(model: Pretrainer, data: Captions, folder: Path) -> None:
    """Write the CLIP as open_clip's own folders are, with sentences of length 1 on average.

    Pretraining leaves that length open, as it normalises all embeddings. The soft contrastive loss of segmentation does
    not: long ones would make it the larger, and adapters learn less.
    """
    weights = {name: each.contiguous() for name, each in model.clip.state_dict().items()}
    lengths = torch.cat([model.encode_text(part, normalize=False).norm(dim=-1) for part in data.tokens.split(256)])
    weights["text_projection"] = weights["text_projection"] / lengths.mean()
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = open_clip.get_model_preprocess_cfg(model.clip)
    config = {"model_cfg": open_clip.get_model_config(model.args.model), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    model = Pretrainer(args)
    size, tokenizer = model.clip.visual.image_size, open_clip.get_tokenizer(args.model)
    data = Captions(args.data, size=size, tokenizer=tokenizer, held_out=args.held_out)
    patches = math.prod(side // patch for side, patch in zip(size, model.patch, strict=True))
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warmup = max(1, args.steps // 20)
    factor = lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint, first, seconds, sums, log = args.output / "checkpoint.pt", 0, 0.0, {}, []
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first, seconds, sums, log = (state[name] for name in ("step", "seconds", "sums", "log"))
    started = time.perf_counter() - seconds
    print(f"{len(data.train)} pictures to train on, {len(data.held_out)} held out, {len(data.sentences)} sentences")
    model.train()
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step"):
        numbers, asked = draw_step(data, args, step, patches)
        true = data.true[numbers][:, asked.sentences]
        losses = model(data.images[numbers], true, data.tokens[asked.sentences], asked)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        sums = {name: sums.get(name, 0.0) + loss.item() for name, loss in losses.items()}
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            count = (step % args.checkpoint_every) + 1
            log.append({"step": step + 1, **{name: round(value / count, 5) for name, value in sums.items()}})
            log[-1] |= score(model, data)
            print(log[-1], flush=True)
            sums, seconds = {}, time.perf_counter() - started
            model.train()
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "seconds": seconds, "sums": sums, "log": log}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            (args.output / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
    save(model, data, args.output)
    scores = {**score(model, data), "steps": args.steps, "seconds": round(time.perf_counter() - started, 1)}
    (args.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    checkpoint.unlink()
    print(scores)


if __name__ == "__main__":
    main(ARGS)
