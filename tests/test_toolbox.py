"""KL divergence of the adapters' values, learned beta, deep ensembles, and training without noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_models import SENTENCES, of_open_clip
from support import CONFIG, FEW_HOSTS, HOST, MAPS, images, injected, normal, randomise, segmenter, unchanged
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.data import default_collate

import pvl_adapter as pvl
from pvl_adapter.attention import kl_to_standard_normal

LEARNED = replace(CONFIG, learn_beta=True)


def losses(model: pvl.MedCLIPSeg, **settings: float) -> pvl.LossTerms:
    image, words = model.prepare(images()), HOST.ids
    out = model(image, words, sample=False, kl=True)
    mask = torch.ones(out.logits.shape)
    features = {"patch_tokens": out.patch_tokens, "text_embeds": out.text_embeds}
    return pvl.SegmentationLoss(**settings)(out.logits, mask, kl=out.kl, **features)


# ---- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kl_is_that_of_torch_averaged_over_real_tokens(dtype: torch.dtype) -> None:
    mean, var = normal(2, 5, 3).to(dtype), (normal(2, 5, 3, seed=1).exp() + 0.01).to(dtype)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])

    got, whole = kl_to_standard_normal(mean, var, mask=mask), kl_to_standard_normal(mean, var)

    each = kl_divergence(Normal(mean.double(), var.double().sqrt()), Normal(0.0, 1.0))  # [B, K, C]
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        got.double(), torch.stack([each[0, mask[0]].mean(0), each[1].mean(0)]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(whole.double(), each.mean(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(kl_to_standard_normal(mean, var, mask=mask & False), torch.zeros_like(got))


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
def test_kl_of_a_model_leaves_out_padding_and_changes_nothing_else(host) -> None:
    clip = injected(host)
    image, text = host.image, host.text
    plain, got = pvl.encode(clip, image, text), pvl.encode(clip, image, text, kl=True)
    few = pvl.encode(clip, image, text, kl=True, text_tokens=False)  # computes no padding
    assert plain.kl is None
    assert torch.equal(plain.image_embeds, got.image_embeds)
    assert got.kl.shape == (len(got.image_embeds), 2 * 2, CONFIG.dim)
    assert (got.kl > 0).all()
    torch.testing.assert_close(few.kl, got.kl, rtol=1e-4, atol=1e-5)
    with pvl.disable_adapters(clip):
        assert pvl.encode(clip, image, text, kl=True).kl is None


def test_kl_weight_and_free_bits_reach_the_loss_and_the_gradients() -> None:
    model = segmenter()
    without, heavy = losses(model), losses(model, kl_weight=2.0)
    torch.testing.assert_close(heavy.total, without.total + 2.0 * without.kl)
    mean = model(model.prepare(images()), HOST.ids, sample=False, kl=True).kl.mean(dim=0)
    free = float(mean.detach().median())
    some, none = losses(model, kl_weight=1.0, free_bits=free), losses(model, kl_weight=1.0, free_bits=1e3)
    torch.testing.assert_close(some.kl, torch.where(mean > free, mean, torch.tensor(free)).mean())
    values = [p for name, p in model.named_parameters() if ".v_proj." in name]
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(some.kl, values))
    assert all(not gradient.any() for gradient in torch.autograd.grad(none.kl, values))


def test_a_weight_without_its_kl_is_refused() -> None:
    model = segmenter()
    out = model(model.prepare(images()), HOST.ids)
    features = {"patch_tokens": out.patch_tokens, "text_embeds": out.text_embeds}
    with pytest.raises(ValueError, match=r"kl_weight is 0.1.*kl=True"):
        pvl.SegmentationLoss(kl_weight=0.1)(out.logits, torch.ones(out.logits.shape), **features)


def test_minimising_kl_brings_the_values_to_the_prior() -> None:
    model = segmenter()
    values = [p for name, p in model.named_parameters() if ".v_proj." in name or ".norm_v." in name]
    optimizer, first = torch.optim.Adam(values, lr=0.05), float(losses(model).kl.detach())
    for _ in range(40):
        optimizer.zero_grad()
        losses(model).kl.backward()
        optimizer.step()
    assert float(losses(model).kl.detach()) < 0.1 * first


def test_kl_is_the_same_with_checkpointing_autocast_and_compiled() -> None:
    model = segmenter()
    expected = losses(model).kl
    gradient = torch.autograd.grad(expected, list(model.clip.pvl_adapters.parameters()), allow_unused=True)
    recomputed = segmenter(config=replace(CONFIG, gradient_checkpointing=True))
    again = losses(recomputed).kl
    assert torch.equal(again, expected)
    parameters = list(recomputed.clip.pvl_adapters.parameters())
    torch.testing.assert_close(torch.autograd.grad(again, parameters, allow_unused=True), gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses(model).kl
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0.02, atol=0.0)
    model = segmenter(config=replace(CONFIG, layers=(0,)))
    image, words = model.prepare(images()), HOST.ids
    compiled = torch.compile(lambda: model(image, words, sample=False, kl=True).kl, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), model(image, words, sample=False, kl=True).kl)


# ---- learned beta ---------------------------------------------------------------------------------------------------


def test_a_learned_beta_starts_as_the_fixed_one_and_learns() -> None:
    fixed, learned = segmenter(), segmenter(config=LEARNED)
    names = {name for name in learned.state_dict() if name.endswith("log_beta")}
    assert len(names) == 2 * 2
    assert fixed.state_dict().keys() == learned.state_dict().keys() - names
    learned.load_state_dict({**fixed.state_dict(), **{name: torch.full((1,), CONFIG.beta).log() for name in names}})
    image, words = fixed.prepare(images()), HOST.ids
    torch.testing.assert_close(
        learned(image, words, sample=False).logits, fixed(image, words, sample=False).logits, rtol=1e-4, atol=1e-5
    )
    betas = [p for name, p in learned.named_parameters() if name in names]
    before = learned(image, words, sample=False).logits
    before.square().mean().backward()
    with torch.no_grad():
        for beta in betas:
            assert beta.grad.abs() > 0
            beta.sub_(20 * beta.grad.sign())  # a weight that is no logarithm would be negative
    after = learned(image, words, sample=False).logits
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_a_learned_beta_is_saved_and_loaded(tmp_path: Path) -> None:
    clip, fresh = injected(HOST, config=LEARNED), HOST.build()
    pvl.load_adapters(fresh, pvl.save_adapters(clip, tmp_path))
    expected = clip.pvl_adapters.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.pvl_adapters.state_dict().items())
    assert fresh.pvl_adapters.state_dict().keys() == expected.keys()
    with pytest.raises(ValueError, match="learn_beta"):
        pvl.load_adapters(injected(HOST), tmp_path)


def test_a_learned_beta_has_to_start_positive() -> None:
    with pytest.raises(ValueError, match=r"beta is 0.*positive"):
        pvl.PVLConfig(beta=0, learn_beta=True)


# ---- ensembles ------------------------------------------------------------------------------------------------------


def member(seed: int, *, config: pvl.PVLConfig = CONFIG) -> pvl.MedCLIPSeg:
    """On the same CLIP, with other adapters and another head."""
    model = segmenter(config=config)
    randomise(model.clip.pvl_adapters, seed=seed)
    randomise(model.head, seed=seed)
    return model


def predicted(ensemble: pvl.Ensemble | pvl.MedCLIPSeg, **settings: object) -> pvl.Prediction:
    return ensemble.predict(images(), HOST.ids, **{"num_samples": 4, "seed": 3, **settings})


def by_hand(predictions: list[pvl.Prediction]) -> dict[str, Tensor]:
    p = torch.stack([each.probability for each in predictions]).double()
    mean, aleatoric = p.mean(dim=0), torch.stack([each.aleatoric for each in predictions]).double().mean(dim=0)
    total = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    within = torch.stack([each.variance for each in predictions]).double().mean(dim=0)
    errors = torch.stack([each.standard_error for each in predictions]).double()
    return {
        "probability": mean,
        "aleatoric": aleatoric,
        "uncertainty": total,
        "epistemic": total - aleatoric,
        "variance": within + (p - mean).square().mean(dim=0),
        "standard_error": errors.square().sum(dim=0).sqrt() / len(predictions),
    }


@pytest.mark.parametrize("settings", [{}, {"antithetic": False}, {"num_samples": pvl.Auto(max_samples=6)}], ids=str)
def test_an_ensemble_of_one_is_the_model(settings: dict[str, object]) -> None:
    model = segmenter()
    got, expected = predicted(pvl.Ensemble([model]), **settings), predicted(model, **settings)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in (*MAPS, "mask", "num_samples"))


@pytest.mark.parametrize("settings", [{}, {"antithetic": False, "return_samples": True}, {"num_samples": 0}], ids=str)
def test_an_ensemble_of_two_averages_both(settings: dict[str, object]) -> None:
    first, second = segmenter(), member(5)
    ensemble = pvl.Ensemble([first, second])

    with unchanged(first), unchanged(second):
        got, again = predicted(ensemble, **settings), predicted(ensemble, **settings)

    other_seed = 3 | 1 << 62  # of the second member
    single = [predicted(first, **settings), predicted(second, **{**settings, "seed": other_seed})]
    expected = by_hand(single)
    for name in MAPS:
        if name == "variance" and settings.get("num_samples") == 0:  # of the members' disagreement alone
            expected[name] = torch.stack([each.probability for each in single]).double().var(dim=0, correction=0)
        found = getattr(got, name).double()
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(getattr(again, name).double(), found, rtol=0.0, atol=0.0, equal_nan=True)
    assert (got.epistemic > torch.minimum(single[0].epistemic, single[1].epistemic) - 1e-6).all()
    assert got.num_samples.tolist() == (single[0].num_samples + single[1].num_samples).tolist()
    assert len(got.images) == len(images())
    if "return_samples" in settings:
        assert torch.equal(got.samples, torch.cat([each.samples for each in single]))
    if settings.get("num_samples") != 0:
        low, high = got.interval(0.9)
        assert ((low <= got.probability) & (got.probability <= high)).all()


def test_members_keep_their_own_weights_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps rounded copies of weights."""
    monkeypatch.setattr("pvl_adapter.engine.usable_dtype", lambda dtype, device: dtype)  # on any processor
    first, second = segmenter(), member(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = predicted(first), predicted(second, seed=3 | 1 << 62)
        got = predicted(pvl.Ensemble([first, second]))
    torch.testing.assert_close(got.probability, (single[0].probability + single[1].probability) / 2)


def test_members_of_equal_weights_draw_different_noise() -> None:
    twice = predicted(pvl.Ensemble([segmenter(), segmenter()]), return_samples=True).samples
    assert not torch.equal(twice[:4], twice[4:])


def test_what_comes_before_the_first_adapter_is_computed_once() -> None:
    """Of three members, whose samples take many chunks; no output tells, so calls are counted."""
    ensemble, calls = pvl.Ensemble([member(seed, config=pvl.PVLConfig(layers=(2,), dim=8)) for seed in range(3)]), []
    towers = (ensemble.model.clip.visual.transformer, ensemble.model.clip.transformer)
    hooks = [tower.resblocks[1].mlp.register_forward_hook(lambda *_: calls.append(None)) for tower in towers]
    predicted(ensemble, memory_budget=1)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(towers)


def test_weights_are_the_models_own_again_after_an_error() -> None:
    model = segmenter()
    ensemble, own, seen = pvl.Ensemble([model, member(5)]), model.head.mask_head[0].bias.clone(), []

    def fail(head: torch.nn.Module, *_: object) -> None:
        seen.append(head.mask_head[0].bias.clone())
        if len(seen) == 2:
            raise KeyboardInterrupt

    hook = model.head.register_forward_pre_hook(fail)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        predicted(ensemble, num_samples=1)
    hook.remove()
    assert torch.equal(seen[0], own)
    assert not torch.equal(seen[1], own)


def test_saved_members_give_the_same(tmp_path: Path, open_clip_models: dict[str, str]) -> None:
    name = open_clip_models["native"]
    models = [of_open_clip(name, adapters=LEARNED) for _ in range(3)]
    for seed, model in enumerate(models):
        randomise(model.head, seed=seed)
    whole = [models[0].save_pretrained(tmp_path / "0"), models[1].save_pretrained(tmp_path / "1")]
    folders = [*whole, models[2].save_pretrained(tmp_path / "2", whole=False)]
    settings = {"image": images(2), "text": SENTENCES, "num_samples": 2}
    got, expected = pvl.Ensemble(folders).predict(**settings), pvl.Ensemble(models).predict(**settings)
    assert torch.equal(got.probability, expected.probability)


def test_threads_do_not_see_one_anothers_weights() -> None:
    model = segmenter()
    ensemble = pvl.Ensemble([model, member(5), member(6)])
    expected = [predicted(ensemble).probability, predicted(model).probability]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predicted, [ensemble, model] * 6))
    assert all(torch.equal(each.probability, expected[index % 2]) for index, each in enumerate(found))


def test_members_of_another_clip_or_other_settings_are_refused(tmp_path: Path) -> None:
    model, other = segmenter(), member(5)
    with torch.no_grad():
        other.clip.visual.conv1.weight.add_(1.0)
    with pytest.raises(ValueError, match="another CLIP"):
        pvl.Ensemble([model, other])
    with pytest.raises(ValueError, match="another CLIP"):
        pvl.Ensemble([model, other.save_pretrained(tmp_path, whole=False)])
    for setting in ({"beta": 1.0}, {"dim": 4}, {"learn_beta": True}):
        with pytest.raises(ValueError, match="first member"):
            pvl.Ensemble([model, segmenter(config=replace(CONFIG, **setting))])
    with pytest.raises(ValueError, match="expected a list"):
        pvl.Ensemble([])
    with pytest.raises(ValueError, match="no members"):
        pvl.Ensemble([model, member(5)]).predict(images(), HOST.ids, num_samples="distilled")


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_recipe_trains_with_kl_and_learned_beta_and_without_noise(tmp_path: Path) -> None:
    slices = pytest.importorskip("brain_slices", reason="the examples need pvl-adapter[examples]")
    train, data = slices.script("train"), slices.write_brain_slices(tmp_path / "Brain")
    recipe, output = tmp_path / "toolbox.toml", tmp_path / "run"
    recipe.write_text(
        'backbone = "small-patch-16"\nepochs = 1\nbatch_size = 6\nsample = false\n[adapters]\ndim = 8\n'
        "learn_beta = true\n[loss]\nkl_weight = 0.1\nfree_bits = 0.05\n"
    )
    trainer = train.Trainer(
        train.parse([f"--data={data}", f"--recipe={recipe}", "--cpu", "--workers=0", f"--output={output}"])
    )
    batch = default_collate([trainer.rows[index] for index in range(2)])
    found = {}
    for trainer.args.sample in (True, False):
        found[trainer.args.sample] = [float(trainer.losses(batch).total.detach()) for _ in range(2)]
    assert found[True][0] != found[True][1]
    assert found[False][0] == found[False][1]
    terms = trainer.losses(batch)
    slices.forget_accelerator()
    terms.total.backward()
    torch.testing.assert_close(
        terms.total, 0.5 * terms.dice + 0.5 * terms.bce + 0.1 * terms.contrastive + 0.1 * terms.kl
    )
    assert terms.kl > 0.05
    betas = [weight for name, weight in trainer.network.named_parameters() if name.endswith("log_beta")]
    assert len(betas) == 4
    assert all(beta.grad.abs() > 0 for beta in betas)
