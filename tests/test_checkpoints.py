"""What is saved, copied and given back of an emulated model."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import MIXED, assert_all_same, gpt2, step
from models import llama, profile, tokens, with_lora
from torch import Tensor, nn

import aqnsim
from aqnsim import ConfigError
from aqnsim.profiles import load

MODELS = pytest.mark.parametrize("make", [llama, gpt2, lambda: with_lora(llama())], ids=["llama", "gpt2", "lora"])


def outputs(model: nn.Module) -> list[Tensor]:
    ids = tokens()
    return step(model, lambda: model(input_ids=ids, labels=ids).loss)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert_all_same(list(found.values()), list(expected.values()))


def anatomy(model: nn.Module) -> list[Any]:
    """Everything of a model but its values."""
    return [
        [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()],
        [(n, id(p), p.data_ptr(), p.requires_grad, p.dtype) for n, p in model.named_parameters()],
        [[list(v) for k, v in m.__dict__.items() if k.endswith("_hooks")] for m in model.modules()],
        model.config.to_dict(),
    ]


@MODELS
def test_restore_gives_everything_back(make: Callable[[], nn.Module]) -> None:
    model = make().requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_()
    before, state = anatomy(model), values(model)
    emu = aqnsim.emulate(model, MIXED)
    outputs(model)
    emu.restore()
    assert anatomy(model) == before
    assert_same_state(values(model), state)


@MODELS
def test_a_model_that_trains_has_the_same_state_dict(make: Callable[[], nn.Module]) -> None:
    model = make().requires_grad_()
    state = values(model)
    with aqnsim.emulate(model, MIXED):
        assert_same_state(values(model), state)
        outputs(model)
        assert_same_state(values(model), state)
        for v in state.values():
            v.mul_(1.5)
        model.load_state_dict(state)
        assert_same_state(values(model), state)
        found = outputs(model)
    with aqnsim.emulate(model, MIXED):
        assert_all_same(outputs(model), found)


@MODELS
def test_a_deep_copy_computes_and_trains_alone(make: Callable[[], nn.Module]) -> None:
    model = make().requires_grad_()
    with aqnsim.emulate(model, MIXED) as emu:
        expected = outputs(model)
        twin = copy.deepcopy(model)
        assert_all_same(outputs(twin), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.1)
        assert_all_same(outputs(model), expected)
        assert emu.receipts()[0].calls == 3  # the copy reports to the same emulation


def test_an_emulated_model_is_not_pickled() -> None:
    for model in (llama(), nn.Linear(4, 4)):
        emu = aqnsim.emulate(model, profile(weight="mxfp4"))
        for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(ConfigError, match=r"cannot be pickled: save its state_dict\(\)"):
                save(model)
        emu.restore()
        assert pickle.loads(pickle.dumps(model)) is not None


def test_containers_keep_the_names_that_others_go_by() -> None:
    model = llama()
    names = {type(m).__name__ for m in model.modules() if any(m.children())}
    with aqnsim.emulate(model, MIXED):
        assert {type(m).__name__ for m in model.modules() if any(m.children())} == names
        assert set(model._no_split_modules) <= names
        outputs(model)


# ---- save_pretrained -----------------------------------------------------------------------------------------------


def saved(model: nn.Module, path: Path, name: Any = "mxfp4-w4a4", frozen: Any = "master") -> list[Tensor]:
    """Emulate, run and save; what the run gave."""
    with aqnsim.emulate(model, name, seed=4) as emu:
        emu.save_pretrained(path, frozen=frozen)
        return outputs(model)


def loaded(path: Path, frozen: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(not frozen)
    model.get_input_embeddings().requires_grad_()
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", ["master", "cast"])
@pytest.mark.parametrize("name", ["mxfp4-w4a4", "noise-5pct-matmul", MIXED])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, name: Any, what: str, frozen: bool) -> None:
    model = llama(frozen=frozen)
    model.get_input_embeddings().requires_grad_()
    masters = values(model)
    expected = saved(model, tmp_path, name, what)
    twin = loaded(tmp_path, frozen)
    is_cast = what == "cast" and frozen and name != "noise-5pct-matmul"
    assert is_cast != all(torch.equal(v, masters[k]) for k, v in values(twin).items())
    with aqnsim.emulate(twin, name, seed=4) as emu:
        emu.check_checkpoint(tmp_path)
        assert_all_same(outputs(twin), expected)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    record = json.loads((tmp_path / "aqnsim.json").read_text())
    used = load(name)
    assert record == {
        "profile": used.name,
        "fingerprint": used.fingerprint,
        "semantics": aqnsim.profiles.SEMANTICS,
        "seed": 4,
        "frozen": what,
    }


def test_another_profile_is_refused_unless_asked_for(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    twin = loaded(tmp_path, frozen=False)
    with aqnsim.emulate(twin, "nvfp4-w4a4") as emu:
        with pytest.raises(ConfigError, match=r"saved under profile 'mxfp4-w4a4' \(\w+\), not under 'nvfp4-w4a4'"):
            emu.check_checkpoint(tmp_path)
        emu.check_checkpoint(tmp_path, other_profile=True)
        outputs(twin)


def test_a_checkpoint_without_a_record_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    emu = aqnsim.emulate(llama(), "mxfp4-w4a4")
    with pytest.raises(ConfigError, match=r"has no aqnsim\.json"):
        emu.check_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="expected frozen to be one of master, cast, got 'both'"):
        emu.save_pretrained(tmp_path, frozen="both")  # type: ignore[arg-type]


def test_a_merged_model_is_saved_as_it_is_and_not_cast_again_unnoticed(tmp_path: Path) -> None:
    model = with_lora(llama(frozen=True))
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    merged = model.merge_and_unload()
    with pytest.raises(ConfigError, match="changed since the profile was attached"):
        emu.save_pretrained(tmp_path, frozen="master", model=merged)
    emu.save_pretrained(tmp_path, frozen="cast", model=merged)
    weight = merged.model.layers[0].mlp.up_proj.weight
    twin = loaded(tmp_path, frozen=True)
    assert torch.equal(twin.model.layers[0].mlp.up_proj.weight, weight)
    again = aqnsim.emulate(twin, "mxfp4-w4a16")
    with pytest.raises(ConfigError, match=r"casting them again changed 'model\.layers\.0"):
        again.check_checkpoint(tmp_path)
