"""Experiments: what is read, what is refused, and what decides a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aqnsim._errors import ConfigError, UnknownNameError
from training import config
from training.config import Difference, Experiment, diff, from_json, load
from training.sources import PRESETS, names

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("preset", names(PRESETS))
def test_every_experiment_resolves_with_every_preset(name: str, preset: str) -> None:
    experiment = load(name, preset)
    assert (experiment.id, experiment.preset) == (name, preset)
    assert experiment.total_steps > 0
    assert experiment.question.family != "others"
    assert experiment.published is None or experiment.published.caveat


def test_e12_is_the_plans_experiment() -> None:
    e12 = load("e12", "smoke")
    assert e12.profile.name == "mxfp4-w4a16"
    assert isinstance(e12.aqn, config.EpochAware)
    assert (e12.aqn.sigma_start, e12.aqn.sigma_end, e12.aqn.stages) == (0.05, 0.0005, 10)
    assert (e12.lora.rank, e12.lora.alpha, e12.lora.dtype) == (32, 16, "bfloat16")
    assert (e12.algorithm.clip_low, e12.algorithm.clip_high) == (0.2, 0.25)
    assert "No noise was ever injected" in e12.published.caveat


def test_arms_differ_in_their_question_alone() -> None:
    e12, e6a, e7a = (load(name, "smoke") for name in ("e12", "e6a-lora-mxfp4", "e7a-lora-bf16"))
    assert diff(e6a, e7a) == [Difference("profile.name", "mxfp4-w4a16", "ideal")]
    assert {item.key.split(".")[0] for item in diff(e12, e6a)} == {"aqn"}


def test_preset_wins_over_experiment_and_override_over_both() -> None:
    written = load("e12", "smoke").algorithm.learning_rate
    assert written != 1e-5
    changed = load("e12", "smoke", ["algorithm.learning_rate=0.5", "lora.rank=8"])
    assert (changed.algorithm.learning_rate, changed.lora.rank) == (0.5, 8)


def test_claims_are_not_inherited(write: Write) -> None:
    child = load(write("child", 'extends = "e12"\n[question]\nask = "?"'), "smoke")
    assert child.published is None
    assert child.question.control is None
    assert diff(child, load("e12", "smoke")) == []


def test_missing_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"leaves \[model\] and \[task\] to a preset.*smoke"):
        load("e12")


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown experiment 'e13' \(did you mean 'e13n'\?\)"):
        load("e13", "smoke")
    with pytest.raises(UnknownNameError, match=r"unknown preset 'smok' \(did you mean 'smoke'\?\)"):
        load("e12", "smok")
    with pytest.raises(UnknownNameError, match=r"no such file: nowhere\.toml"):
        load("nowhere.toml", "smoke")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aqn.sigma_start=-0.1", r"aqn\.sigma_start = -0\.1: .*greater than 0"),
        ("aqn.sigma_start=nan", r"aqn\.sigma_start = nan: .*finite"),
        ("aqn.sigma_end=0.0", r"aqn\.sigma_end = 0\.0: .*greater than 0"),
        ("aqn.sigma_end=0.06", "sigma_end = 0.06 exceeds sigma_start = 0.05"),
        ("aqn.stages=0", r"aqn\.stages = 0"),
        ("aqn.phases=[]", "phases is empty"),
        ("aqn.default_multiplier=0", "every multiplier is 0"),
        ("aqn.multipliers.14=-1", r"aqn\.multipliers\.14 = -1"),
        ('aqn.schedule="kstage"', r"unknown schedule 'kstage' \(did you mean 'k-stage'\?\)"),
        ("aqn.sigma_strt=1", r"aqn\.sigma_strt: unknown key .*did you mean 'sigma_start'\?"),
        ("algorithm.learning_rat=1", r"unknown key \(did you mean 'learning_rate'\?\)"),
        ("algorithm.learning_rate=0", r"algorithm\.learning_rate = 0"),
        ("algorithm.group_size=1", r"algorithm\.group_size = 1"),
        ("algorithm.micro_batch_size=7", "micro_batch_size = 7 does not divide the 64"),
        ("algorithm.overlong_buffer=6", "overlong_buffer = 6 must be below max_new_tokens = 6"),
        ("algorithm.prompts_per_step=4000", "does not fill one step"),
        ("lora.rank=0", r"lora\.rank = 0"),
        ("lora.rank=-1", r"lora\.rank = -1"),
        ("lora.rank=true", r"lora\.rank = True"),
        ("lora.rank='8'", r"lora\.rank = '8'"),
        ("lora.dtype='fp8'", r"lora\.dtype = 'fp8': .*'bfloat16'"),
        ("lorra.rank=8", r"unknown table 'lorra' \(did you mean 'lora'\?\)"),
        ("published.score=99", "unknown table 'published'"),
        ("lora.rank", "expected table.key=value"),
        ("lora=8", "expected table.key=value"),
        ("profile.name=ideal", "not a TOML value; a string needs its quotes"),
    ],
)
def test_bad_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("e12", "smoke", [override])


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rnk.*algorithm\.stepz"):
        load("e12", "smoke", ["lora.rnk=1", "algorithm.stepz=1"])


def test_k_stage_needs_three_stages() -> None:
    def k_stage(stages: int) -> Experiment:
        settings = ('schedule="k-stage"', "sigma_start=0.1", "sigma_end=0.1", f"stages={stages}")
        return load("e12", "smoke", [f"aqn.{setting}" for setting in settings])

    with pytest.raises(ConfigError, match="stages = 2, but k-stage needs at least 3"):
        k_stage(2)
    assert k_stage(3).aqn.schedule == "k-stage"


def test_another_schedule_does_not_keep_the_keys_of_the_old_one() -> None:
    assert isinstance(load("e12", "smoke", ['aqn.schedule="none"']).aqn, config.NoAqn)
    with pytest.raises(ConfigError, match="sigma_start: unknown key for schedule 'none'"):
        load("e12", "smoke", ['aqn.schedule="none"', "aqn.sigma_start=0.1"])


def test_epoch_aware_needs_whole_epochs() -> None:
    with pytest.raises(ConfigError, match=r"steps = 5 is not a multiple of algorithm\.epochs = 2"):
        load("e12", "smoke", ["algorithm.epochs=2", "algorithm.steps=5"])


def test_steps_follow_from_the_epochs() -> None:
    sizes = ["task.prompts=100", "algorithm.prompts_per_step=8", "algorithm.epochs=2"]
    assert load("e12", "smoke", sizes).total_steps == 24
    assert load("e12", "smoke", [*sizes, "algorithm.steps=6"]).total_steps == 6


def test_extends_is_a_deep_merge_along_a_chain(write: Write) -> None:
    write("parent", 'extends = "e12"\n[question]\nask = "?"\n[lora]\nrank = 4')
    child = load(write("child", 'extends = "parent.toml"\n[question]\nask = "?"\n[lora]\nalpha = 2'), "smoke")
    assert (child.lora.rank, child.lora.alpha, child.lora.dtype) == (4, 2, "bfloat16")
    assert child.id == "child"


def test_extends_in_a_circle_is_refused(write: Write) -> None:
    write("a", 'extends = "b.toml"')
    with pytest.raises(ConfigError, match="round in a circle: b -> a -> b"):
        load(write("b", 'extends = "a.toml"'), "smoke")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = ['e12', 'e6a-lora-mxfp4']", "extends names one parent"),
        ("extends = 'e12x'", r"unknown experiment 'e12x' \(did you mean 'e12'"),
        ("extends = 'e12'\nid = 'mine'", "id: not a key of the file"),
        ("extends = 'e12'\n[question]\nask = '?'\n[quesion]", "quesion: unknown key"),
        ("extends = 'e12'", "question: missing"),
        ("= 3", "not valid TOML"),
        ("extends = 'e12'\n[question]\nask = '?'\ncontrol = 'e12'", "name a control together with"),
    ],
)
def test_bad_files_are_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        load(write("mine", text), "smoke")


def test_a_preset_cannot_change_the_question(write: Write) -> None:
    with pytest.raises(ConfigError, match="may only have the tables model, task, algorithm"):
        load("e12", write("mine", "[aqn]\nsigma_start = 1.0"))


QUESTION = "extends = 'e12'\n[question]\nask = '?'\ncontrol = 'e6a-lora-mxfp4'\ndiffers_in = {}\n"


def test_undeclared_difference_from_the_control_is_refused(write: Write) -> None:
    text = QUESTION.format("['aqn']") + "[lora]\nrank = 8"
    with pytest.raises(ConfigError, match=r"differs from its control.*lora\.rank.*only aqn"):
        load(write("mine", text), "smoke")
    assert load(write("fine", QUESTION.format("['aqn', 'lora.rank']") + "[lora]\nrank = 8"), "smoke")


def test_declared_difference_that_does_not_exist_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"declares that it differs.*in lora\.rank"):
        load(write("mine", QUESTION.format("['aqn', 'lora.rank']")), "smoke")


def test_overrides_are_no_undeclared_difference() -> None:
    assert load("e12", "smoke", ["lora.rank=8"]).lora.rank == 8


def test_digest_covers_all_that_decides_a_run_and_nothing_else(write: Write) -> None:
    e12 = load("e12", "smoke")
    renamed = load(write("other", "extends = 'e12'\n[question]\nask = 'other'"), "smoke")
    assert renamed.digest == e12.digest
    assert load("e12", "smoke", ["lora.rank=8"]).digest != e12.digest
    assert load("e12", "smoke", ["aqn.multipliers.14=1.0"]).digest != e12.digest
    assert len(e12.digest) == 64


def test_a_resolved_experiment_survives_json() -> None:
    overrides = ["aqn.multipliers.14=0.5", "aqn.default_multiplier=0.0", "lora.targets=['q_proj']"]
    experiment = load("e12", "smoke", overrides)
    again = from_json(experiment.model_dump_json(), "test")
    assert again == experiment
    assert again.digest == experiment.digest


def test_diff_shows_a_setting_that_one_arm_lacks() -> None:
    a = load("e12", "smoke")
    b = load("e12", "smoke", ["aqn.multipliers.14=0.5"])
    assert diff(a, b) == [Difference("aqn.multipliers.14", None, 0.5)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('profile.directions="sideways"', r"profile\.directions = 'sideways'"),
        ("profile.keep_layers=[0, 0]", "names a layer twice"),
        ('profile.evaluate_on="mxfp4-w4a16"', "is the profile itself"),
        ('algorithm.name="grpo"', "set dynamic_sampling = false"),
        ("algorithm.kl=-0.1", r"algorithm\.kl = -0\.1"),
        ("algorithm.updates_per_step=3", "updates_per_step = 3 does not divide prompts_per_step = 8"),
        ("algorithm.updates_per_step=8", "micro_batch_size = 64 does not divide the 8 completions of an update"),
        ("lora={method='none', rank=8}", "expected table.key=value"),
        ('lora.method="dora"', r"lora\.method: unknown method 'dora'.*known: lora, none"),
        ('task.name="gsm8"', r"task\.name: unknown task 'gsm8' \(did you mean 'gsm8k'\?\)"),
        ("aqn.layers_of=28", "layers_of = 28 has no effect: no layer is named"),
        ("aqn.zones=[{first=2, last=1, multiplier=1.0}]", r"aqn\.zones\.0: first = 2 exceeds last = 1"),
        ("aqn.zones=[{first=0, last=1}]", "give a zone either a multiplier or factors"),
        ("aqn.zones=[{first=0, last=1, multiplyer=1.0}]", "multiplyer: unknown key .*did you mean 'multiplier'"),
    ],
)
def test_bad_choices_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("e12", "smoke", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layers_of=28", "multipliers.28=1.0"], "more layers are named or drawn than that"),
        (["layers_of=3", "random_layers=4"], "more layers are named or drawn than that"),
        (["random_layers=4", "multipliers.1=1.0"], "name none in multipliers or zones"),
    ],
)
def test_layers_must_fit_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("e12", "smoke", [f"aqn.{text}" for text in overrides])


def test_training_all_weights_leaves_no_key_of_the_adapters() -> None:
    full = load("e12", "smoke", ['lora.method="none"'])
    assert full.settings().keys() & {f"lora.{key}" for key in config.Lora.model_fields} == {"lora.method"}
    with pytest.raises(ConfigError, match=r"lora\.rank: unknown key for method 'none'"):
        load("e12", "smoke", ['lora.method="none"', "lora.rank=8"])


def test_a_preset_has_other_values_for_grpo_and_for_all_weights(write: Write) -> None:
    preset = write(
        "mine",
        '[model]\nname="tiny"\ndtype="bfloat16"\n[task]\nname="arithmetic"\nprompts=999\neval_problems=8\n'
        "families={add-1x1=1.0}\nexamples=0\nheld_out=0.5\n[algorithm]\nmicro_batch_size=4\n"
        '[grpo.task]\nprompts=512\n[full.model]\ndtype="float32"\n',
    )
    found = {name: load(name, preset) for name in ("e12", "e8a-full-bf16", "hw-clean")}
    assert {name: (e.task.prompts, e.model.dtype) for name, e in found.items()} == {
        "e12": (999, "bfloat16"),
        "e8a-full-bf16": (999, "float32"),
        "hw-clean": (512, "float32"),
    }
    with pytest.raises(ConfigError, match="may only have the tables model, task, algorithm"):
        load("e12", write("bad", "[full.lora]\nrank = 1"))


def test_settings_that_were_added_since_leave_old_records_valid() -> None:
    e12 = load("e12", "smoke")
    tables = json.loads(e12.model_dump_json())
    for table, key in [("lora", "method"), ("profile", "keep_layers"), ("algorithm", "kl"), ("aqn", "zones")]:
        del tables[table][key]
    stored = config.digest_of(tables)
    assert stored != e12.digest
    again = from_json(json.dumps(tables), "an old record")
    assert again == e12
    tables["lora"]["rank"] += 1
    assert config.digest_of(tables) != stored
