"""The command ``aqnsim sites``: the ops of a model, and what becomes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from models import llama

from aqnsim import cli
from aqnsim.cli.sites import small_model

Capture = pytest.CaptureFixture[str]


def test_a_family_is_shown_small_with_every_op_and_its_status(capsys: Capture) -> None:
    assert cli.main(["sites", "qwen3_moe", "--profile", "mxfp4-w4a4", "--length", "16"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "emulated (rule 1)" in rows["model.layers.*.mlp.experts.gate_up_proj"]
    assert "4x96x64" in rows["model.layers.*.mlp.experts.gate_up_proj"]
    assert "excluded" in rows["lm_head"]
    assert "router" in rows["model.layers.*.mlp.gate"]
    assert "kept" in rows["model.layers.*.self_attn.qk"]
    assert "% of the FLOPs" in rows["emulated:"]
    assert "uncovered" not in out


def test_all_shows_each_layer(capsys: Capture) -> None:
    assert cli.main(["sites", "llama", "--all", "--length", "4"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj" in out
    assert "model.layers.1.mlp.up_proj" in out


def test_json_holds_every_op(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "sites.json"
    assert cli.main(["sites", "llama", "--json", str(file), "--length", "8", "--batch", "2"]) == 0
    data = json.loads(file.read_text())
    ops = {op["name"]: op for op in data["ops"]}
    assert data["profile"] is None
    assert ops["lm_head"]["flops"] == 2 * 16 * 64 * 128
    assert sum(op["share"] for op in data["ops"]) == pytest.approx(1.0)
    assert sum(op["flops"] for op in data["ops"]) == data["flops"]


def test_a_checkpoint_and_its_configuration_have_the_same_ops(tmp_path: Path, capsys: Capture) -> None:
    llama().save_pretrained(tmp_path)
    shown = []
    for model in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["sites", str(model), "--length", "4"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "48x32" in shown[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lama", "'lama' is neither a folder, a config.json nor a model_type of transformers such as llama (did you"),
        ("/", "/ holds no causal language model of transformers"),
        ("missing.json", "missing.json is no configuration of transformers"),
    ],
)
def test_a_model_that_is_not_there_is_one_error(model: str, message: str, capsys: Capture) -> None:
    assert cli.main(["sites", model]) == 2
    assert message in capsys.readouterr().err


def test_no_tokens_are_refused(capsys: Capture) -> None:
    assert cli.main(["sites", "llama", "--length", "0"]) == 2
    assert "expected at least one row of one token, got batch 1, length 0" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["sites", "llama"]) == 2
    assert "sites needs transformers to build a model: pip install transformers" in capsys.readouterr().err


def test_a_small_model_is_the_same_each_time() -> None:
    first, second = small_model("gpt2").state_dict(), small_model("gpt2").state_dict()
    assert all(first[name].equal(second[name]) for name in first)
