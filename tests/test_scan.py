"""Scans: a site that is fragile is found by what it changes, measures are told apart, and keeping sites is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import llama, profile
from torch import nn
from values import same_bits

import aqnsim
from aqnsim import ConfigError, UnknownNameError
from aqnsim.cli import main
from aqnsim.diagnose import METRICS, Scan, Text, multipliers, plan, scan
from aqnsim.diagnose.text import logits_of

W4A4 = profile(weight="mxfp4", input="mxfp4", exclude=("lm_head",))


def text(windows: int = 4) -> Text:
    return Text(torch.randint(3, 64, (windows, 24), generator=torch.Generator().manual_seed(0)), batch=2)


def fragile() -> nn.Module:
    """A model in which one layer's input has an outlier in every block: a cast in fours loses the rest of it."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[::16] *= 300
    return model


@pytest.fixture(scope="module")
def scanned() -> Scan:
    return scan(fragile(), W4A4, text())


def test_every_site_has_every_measure(scanned: Scan) -> None:
    assert len(scanned.sites) == 14
    assert {m for s in scanned.sites for m, v in s.values.items() if v is not None} == set(METRICS)
    assert {s.layer for s in scanned.sites} == {0, 1}
    assert scanned.whole.kl > 0
    assert scanned.whole.loss_change == pytest.approx(scanned.whole.loss - scanned.loss)


def test_the_site_that_loses_its_input_is_found_where_its_input_is_looked_at(scanned: Scan) -> None:
    worst = {s.name for s in scanned.ranking("input_zeros")[:2]}
    assert worst == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")}
    assert {s.name for s in scanned.ranking("weight_sqnr_db")[:2]} != worst


def test_one_site_alone_is_one_site_alone() -> None:
    """Checked by hand: the weight and the input of that layer are cast, and nothing else."""
    model, asked = fragile(), text()
    found = scan(model, profile(weight="mxfp4", exclude=("lm_head",)), asked, gradients=False, without=False)
    site = found.ranking("kl_only")[0]
    layer = model.get_submodule(site.name)
    layer.weight.data = aqnsim.cast(layer.weight.data, "mxfp4")
    assert asked.effect(model).kl == pytest.approx(site.values["kl_only"], rel=1e-6)
    assert site.values["kl_without"] is None


def test_all_but_one_and_none_differ_by_that_one() -> None:
    model, asked = llama(), text()
    two = profile(weight="mxfp4", sites=("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"))
    found = scan(model, two, asked, gradients=False)
    a, b = found.sites
    assert a.values["kl_without"] == b.values["kl_only"]
    assert b.values["kl_without"] == a.values["kl_only"]
    one = scan(model, profile(weight="mxfp4", sites=("model.layers.0.mlp.up_proj",)), asked, gradients=False)
    assert one.sites[0].values["kl_without"] == 0
    assert one.sites[0].values["kl_only"] == pytest.approx(one.whole.kl)


def test_the_model_is_left_as_it_was() -> None:
    model, asked = llama(frozen=True), text()
    before = {n: p.clone() for n, p in model.named_parameters()}
    clean = logits_of(model, asked.tokens)
    scan(model, W4A4, asked)
    assert all(same_bits(p, before[n]) and not p.requires_grad and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(logits_of(model, asked.tokens), clean)


def test_measures_agree_with_themselves_and_are_told_apart(scanned: Scan) -> None:
    agreement = scanned.agreement()
    assert agreement["weight_sqnr_db", "weight_nmse"] == pytest.approx(1)
    assert all(-1 - 1e-9 <= r <= 1 + 1e-9 for r in agreement.values())
    assert min(agreement.values()) < 0.5
    with pytest.raises(UnknownNameError, match="did you mean 'kl_only'"):
        scanned.ranking("kl_onyl")


def test_a_gradient_through_exact_casts_has_no_noise_and_through_coarse_ones_has(scanned: Scan) -> None:
    exact = scan(llama(), profile(weight="e8m22", input="e8m22", exclude=("lm_head",)), text(), without=False)
    assert all(s.values["gradient_snr_db"] > 100 for s in exact.sites)  # type: ignore[operator]
    assert all(s.values["gradient_snr_db"] < 30 for s in scanned.sites)  # type: ignore[operator]


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_a_memory_budget_is_kept_and_what_it_buys_is_measured(scanned: Scan) -> None:
    model, asked = fragile(), text()
    asked.record(model)
    found = plan(scanned, model, asked, extra_bytes=6000)
    assert 0 < found.extra_bytes <= 6000
    assert 0 < len(found.keep) < 14
    assert found.before == scanned.whole
    assert found.after.kl < found.before.kl
    with aqnsim.emulate(model, found.profile) as emu:
        assert {s.name for s in emu.sites} == {s.name for s in scanned.sites} - set(found.keep)
        assert asked.effect(model) == found.after
    # 32 columns: 4 bits a number, 8 bits a block of 32
    sizes = {s.name: s.parameters for s in scanned.sites}
    assert found.extra_bytes == pytest.approx(sum(sizes[n] for n in found.keep) * (16 - 4.25) / 8, abs=len(found.keep))


def test_an_accuracy_budget_is_met_with_the_fewest_sites_of_the_queue(scanned: Scan) -> None:
    model, asked = fragile(), text()
    asked.record(model)
    target = scanned.whole.kl / 2
    found = plan(scanned, model, asked, kl=target)
    assert found.after.kl <= target
    with_less = plan(scanned, model, asked, kl=found.after.kl)
    assert len(with_less.keep) <= len(found.keep)
    everything = plan(scanned, model, asked, kl=0.0)
    assert len(everything.keep) == 14
    assert everything.after.kl == 0
    assert everything.profile.rules == ()


def test_budgets_that_are_none_or_two_are_refused(scanned: Scan) -> None:
    for budget in ({}, {"extra_bytes": 5, "kl": 0.1}):
        with pytest.raises(ConfigError, match="give one budget"):
            plan(scanned, llama(), text(), **budget)  # type: ignore[arg-type]


def test_multipliers_have_a_mean_of_1_and_follow_the_error(scanned: Scan) -> None:
    found = multipliers(scanned)
    assert set(found) == {0, 1}
    assert sum(found.values()) / 2 == pytest.approx(1, abs=1e-3)
    by_layer = {layer: sum(s.values["input_nmse"] or 0 for s in scanned.sites if s.layer == layer) for layer in (0, 1)}
    assert (found[0] < found[1]) == (by_layer[0] < by_layer[1])
    uncast = dataclasses.replace(
        scanned, sites=tuple(dataclasses.replace(s, values=dict.fromkeys(METRICS)) for s in scanned.sites)
    )
    with pytest.raises(ConfigError, match="no site in a layer has input_nmse"):
        multipliers(uncast)


@pytest.mark.parametrize("tokens", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)])
def test_texts_that_are_too_short_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="expected at least one window of two tokens"):
        Text(tokens, length=8)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    fragile().save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{3 + 7 * i % 60}" for i in range(200)))
    return folder


def test_the_command_ranks_keeps_and_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, plot, toml = (tmp_path / n for n in ("scan.json", "scan.png", "kept.toml"))
    asked = ["scan", str(checkpoint), "--profile", "mxfp4-w4a4", "--text", str(checkpoint / "text.txt")]
    sizes = ["--windows", "4", "--length", "24", "--keep-bytes", "6000"]
    assert main([*asked, *sizes, "--out", str(toml), "--json", str(data), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "mxfp4-w4a4" in printed
    assert "worst first by kl_only" in printed
    assert "stay in 16 bits" in printed
    found = json.loads(data.read_text())
    assert len(found["sites"]) == 14
    assert set(found["aqn_multipliers"]) == {"0", "1"}
    kept = aqnsim.profiles.load(toml)
    assert set(found["plan"]["keep"]) <= set(kept.exclude)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*asked, "--out", str(toml)]) == 2
    assert "give --keep-bytes or --keep-kl" in capsys.readouterr().err
