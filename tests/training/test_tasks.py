"""training.tasks: the splits, the mixture, the prompts and how answers are read."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqnsim._errors import ConfigError, UnknownNameError
from training.tasks import FAMILIES, Arithmetic, extract, load_task

MIX = Arithmetic({"add-2x1": 3, "sub-2x1": 1, "mul-1x1": 1})


def expressions(problems):
    return [problem.problem_id for problem in problems]


def commuted(expression):
    left, operation, right = expression.split()
    return f"{right} {operation} {left}"


class TestSplits:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_no_problem_is_in_both_splits(self, name):
        family = FAMILIES[name]
        task = Arithmetic({name: 1})
        everything = {family.text(operands) for operands in family.operands()}
        train = set(expressions(task.problems("train", 3 * len(everything), seed=0)))
        pool = len(everything - train)  # the eval split, and at most 8 worked examples and their commutations
        evaluated = set(expressions(task.problems("eval", pool - 8, seed=1)))
        assert train
        assert evaluated
        assert not train & evaluated
        assert train | evaluated <= everything

    @given(st.integers(0, 2**32), st.integers(0, 2**32))
    def test_seeds_do_not_mix_the_splits(self, seed, other):
        train = set(expressions(MIX.problems("train", 200, seed)))
        evaluated = set(expressions(MIX.problems("eval", 60, other)))
        assert not train & evaluated

    def test_the_mixture_does_not_mix_the_splits(self):
        train = set(expressions(Arithmetic({"add-1x1": 5, "add-2x1": 1}).problems("train", 999, 0)))
        evaluated = set(expressions(MIX.problems("eval", 60, 0)))
        assert not train & evaluated

    @pytest.mark.parametrize("families", [("add-1x1", "add-1x1"), ("add-2x1", "add-1x2")])
    def test_commuted_problems_share_a_split(self, families):
        one, other = families
        train = expressions(Arithmetic({one: 1}).problems("train", 2000, 0))
        evaluated = set(expressions(Arithmetic({other: 1}).problems("eval", 36, 0)))
        assert evaluated
        assert not {commuted(expression) for expression in train} & evaluated

    def test_worked_examples_are_in_no_split(self):
        task = Arithmetic({"add-1x1": 1, "sub-1x1": 1, "mul-1x1": 1})
        shown = {"3 + 4", "4 + 3", "9 - 5", "6 * 7", "7 * 6", "8 + 5", "5 + 8"}
        for split, count in [("train", 600), ("eval", 57)]:
            assert not shown & set(expressions(task.problems(split, count, 0)))

    @pytest.mark.parametrize("held_out", [0.1, 0.5])
    def test_held_out_is_the_share_of_the_eval_split(self, held_out):
        family = FAMILIES["add-2x2"]
        inside = sum(family.in_eval(operands, held_out) for operands in family.operands())
        assert inside / len(family.operands()) == pytest.approx(held_out, abs=0.02)

    def test_a_smaller_eval_split_is_a_subset(self):
        family = FAMILIES["add-2x1"]
        for operands in family.operands():
            assert family.in_eval(operands, 0.5) or not family.in_eval(operands, 0.2)


class TestDrawing:
    def test_same_arguments_same_problems_in_every_process(self):
        code = (
            "from training.tasks import Arithmetic\n"
            "for p in Arithmetic({'add-2x1': 3, 'sub-2x1': 1, 'mul-1x1': 1}).problems('train', 50, 7):\n"
            "    print(p.prompt, p.answer)"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        here = [f"{p.prompt} {p.answer}" for p in MIX.problems("train", 50, 7)]
        assert other.stdout.splitlines() == here

    def test_another_seed_gives_other_problems(self):
        assert expressions(MIX.problems("train", 50, 0)) != expressions(MIX.problems("train", 50, 1))

    def test_families_come_in_proportion_and_in_random_order(self):
        drawn = expressions(MIX.problems("train", 101, 0))
        signs = [expression.split()[1] for expression in drawn]
        assert {sign: signs.count(sign) for sign in "+-*"} == {"+": 61, "-": 20, "*": 20}
        assert signs != sorted(signs)

    def test_eval_problems_are_distinct(self):
        drawn = expressions(MIX.problems("eval", 150, 0))
        assert len(set(drawn)) == 150

    def test_train_problems_repeat_only_after_a_full_pass(self):
        drawn = expressions(Arithmetic({"mul-1x1": 1}).problems("train", 100, 0))
        pool = len(set(drawn))
        assert pool < 50
        counts = {drawn.count(expression) for expression in drawn}
        assert counts <= {100 // pool, -(-100 // pool)}

    def test_too_many_eval_problems(self):
        with pytest.raises(ConfigError, match=r"100 eval problems of family 'mul-1x1'.* it has \d+"):
            Arithmetic({"mul-1x1": 1}).problems("eval", 100, 0)

    @pytest.mark.parametrize("count", [0, -1])
    def test_no_problems(self, count):
        with pytest.raises(ConfigError, match=f"{count} problems"):
            MIX.problems("train", count, 0)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_answers_are_right(self, name):
        for problem in Arithmetic({name: 1}).problems("train", 20, 0):
            assert int(problem.answer) == eval(problem.problem_id)
            assert int(problem.answer) >= 0


class TestPrompts:
    def test_examples_come_first(self):
        problem = Arithmetic({"add-2x1": 1}, examples=2).problems("train", 1, 0)[0]
        assert problem.prompt == f"3 + 4 = 7, 9 - 5 = 4, {problem.problem_id} ="

    def test_without_examples(self):
        problem = Arithmetic({"add-2x1": 1}, examples=0).problems("train", 1, 0)[0]
        assert problem.prompt == f"{problem.problem_id} ="


class TestScore:
    @pytest.mark.parametrize(
        ("completion", "strict", "flexible"),
        [
            (" 12", 12, 12),
            (" 12,", 12, 12),
            ("12", 12, 12),
            (" 12, 3 + 4 = 7,", 12, 12),
            (" 12\n3", 12, 12),
            (" 012,", 12, 12),
            (" -12,", -12, -12),
            (" 12.", None, 12),
            (" 12 and", None, 12),
            (" 1 2,", None, 1),
            ("the answer is 12", None, 12),
            (", 12", None, 12),
            ("\n12", None, 12),
            ("--12", None, -12),
            (" 12.5", None, 12),
            ("", None, None),
            (",", None, None),
            (" twelve,", None, None),
            (" \u0661\u0662,", None, None),
        ],
    )
    def test_extraction(self, completion, strict, flexible):
        assert extract(completion, "strict", end=",") == strict
        assert extract(completion, "flexible", end=",") == flexible

    def test_score(self):
        assert MIX.score(" 12,", "12")
        assert not MIX.score(" 13,", "12")
        assert not MIX.score(" 1", "12")
        assert not MIX.score(" 12 or so", "12")
        assert MIX.score(" 12 or so", "12", "flexible")

    def test_a_right_answer_scores_in_both_ways(self):
        for problem in MIX.problems("eval", 50, 0):
            completion = f" {problem.answer}{MIX.end}"
            assert MIX.score(completion, problem.answer)
            assert MIX.score(completion, problem.answer, "flexible")

    def test_unknown_extraction(self):
        with pytest.raises(UnknownNameError, match="did you mean 'strict'"):
            extract("1", "stric", end=",")


class TestParameters:
    def test_unknown_names(self):
        with pytest.raises(UnknownNameError, match="did you mean 'arithmetic'"):
            load_task("aritmetic")
        with pytest.raises(UnknownNameError, match="did you mean 'add-2x1'"):
            load_task("arithmetic", families={"add_2x1": 1.0})
        with pytest.raises(UnknownNameError, match="did you mean 'train'"):
            MIX.problems("trian", 1, 0)

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"families": {}}, "families is empty"),
            ({"families": {"add-1x1": 0.0}}, r"task\.families\.add-1x1 = 0\.0"),
            ({"families": {"add-1x1": float("nan")}}, "nan"),
            ({"examples": 5}, "task.examples = 5: expected 0 to 4"),
            ({"examples": -1}, "task.examples = -1"),
            ({"held_out": 0.0}, "task.held_out = 0.0"),
            ({"held_out": 1.0}, "task.held_out = 1.0"),
            ({"held_out": float("nan")}, "task.held_out = nan"),
        ],
    )
    def test_out_of_range(self, parameters, message):
        with pytest.raises(ConfigError, match=message):
            load_task("arithmetic", **{"families": {"add-1x1": 1.0}} | parameters)
