"""The parity runner on golden cases made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from reprise.errors import ConfigError
from reprise.evidence import parity

ADAPTERS = """
import torch
def double(case):
    return {"y": case.inputs["x"] * case.config["factor"], "extra": torch.zeros(3)}
def crash(case):
    raise RuntimeError("no such option\\nsecond line")
def peek(case):
    return {"y": case.outputs["y"]}
def nothing(case):
    return None
ADAPTERS = {"double": double, "crash": crash, "peek": peek, "nothing": nothing}
"""
X = torch.tensor([1.0, -2.0, 4.0])


@pytest.fixture
def goldens(tmp_path, paper_module):
    paper_module("parity", ADAPTERS)

    def write(
        name: str, outputs, *, kind="double", paper="toy_paper", atol=1e-6, rtol=0.0, by_output=None, x=X, factor=2
    ):
        folder = tmp_path / "goldens" / "toy_paper" / name
        folder.mkdir(parents=True)
        tolerance = {"atol": atol, "rtol": rtol} | ({"by_output": by_output} if by_output else {})
        case = {"paper": paper, "kind": kind, "config": {"factor": factor}, "tolerance": tolerance}
        (folder / "case.json").write_text(json.dumps(case))
        save_file({"in/x": x, **{f"out/{key}": value for key, value in outputs.items()}}, folder / "io.safetensors")
        return tmp_path / "goldens"

    return write


def only(folder: Path):
    (result,) = parity.run_parity(folder)
    return result


def test_a_right_case_passes_and_extra_outputs_do_not_matter(goldens):
    result = only(goldens("right", {"y": X * 2}))
    assert result.passed
    assert (result.case, result.paper, result.kind) == ("toy_paper/right", "toy_paper", "double")
    assert result.outputs[0].max_error == 0.0


@pytest.mark.parametrize(("off", "rtol", "passed"), [(0.9e-3, 0, True), (1.1e-3, 0, False), (1.1e-3, 1e-3, True)])
def test_tolerances(goldens, off, rtol, passed):
    by_output = {"y": {"atol": 1e-3, "rtol": rtol}}
    result = only(goldens("near", {"y": (X * 2).double() + off}, by_output=by_output, x=X.double()))
    assert result.passed is passed
    assert result.outputs[0].max_error == pytest.approx(off)


def test_integers_and_booleans_compare_exactly(goldens):
    large = torch.tensor([2**60, 3])
    assert only(goldens("int", {"y": large * 2}, x=large, atol=0)).passed
    goldens("off", {"y": large * 2 + 1}, x=large, atol=0)
    results = parity.run_parity(goldens("bool", {"y": torch.tensor([True])}, x=torch.tensor([True]), atol=0, factor=1))
    assert [result.passed for result in results] == [True, True, False]
    assert results[2].outputs[0].max_error == 1.0


def test_special_values_must_stand_in_the_same_places(goldens):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert only(goldens("same", {"y": special * 2}, x=special)).passed
    goldens("ours_nan", {"y": torch.ones(4)}, x=special)
    results = parity.run_parity(goldens("theirs_nan", {"y": special}, x=torch.ones(4)))
    assert [result.passed for result in results] == [False, True, False]
    assert "NaN" in results[0].outputs[0].message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "unheard_of"}, "no adapter for the kind 'unheard_of'"),
        ({"paper": "nobody"}, "no paper 'nobody'"),
        ({"kind": "crash"}, "RuntimeError: no such option second line"),
        ({"kind": "peek"}, "AttributeError"),
        ({"kind": "nothing"}, "NoneType"),
    ],
)
def test_whatever_goes_wrong_is_a_failure_with_its_message(goldens, arguments, message):
    result = only(goldens("bad", {"y": X * 2}, **arguments))
    assert not result.passed
    assert message in result.message


def test_missing_and_misshapen_outputs_fail(goldens):
    result = only(goldens("bad", {"y": torch.zeros(3, 1), "z": X.clone()}))
    assert [output.message for output in result.outputs] == [
        "shape [3] instead of [3, 1]",
        "the adapter gave no such output",
    ]
    assert not only(goldens("none", {}).joinpath("toy_paper", "none")).passed


def test_a_damaged_case_fails_and_the_others_run(goldens):
    folder = goldens("right", {"y": X * 2})
    (folder / "toy_paper" / "damaged").mkdir()
    (folder / "toy_paper" / "damaged" / "case.json").write_text("{")
    damaged, right = parity.run_parity(folder)
    assert right.passed
    assert not damaged.passed


def test_no_case_is_an_error(goldens, tmp_path):
    folder = goldens("right", {"y": X * 2}, paper="someone_else")
    with pytest.raises(ConfigError, match="no golden cases of toy_paper"):
        parity.run_parity(folder, "toy_paper")
    with pytest.raises(ConfigError, match="no golden cases"):
        parity.run_parity(tmp_path / "nowhere")


def test_table_json_and_record(goldens, workshop):
    goldens("right", {"y": X * 2})
    results = parity.run_parity(goldens("wrong", {"y": X * 3}))
    console = Console(width=160, record=True)
    parity.print_results(results, console)
    text = console.export_text()
    assert text.rstrip().endswith("1 passed, 1 failed")
    assert "FAIL" in text
    content = json.loads(parity.to_json(results))
    assert (content["passed"], content["failed"], content["total"]) == (1, 1, 2)
    (path,) = parity.write_records(results)
    assert path == workshop.experiment / "PARITY.json"
    record = json.loads(path.read_text())
    assert (record["passed"], record["total"], record["cases"][1]["max_error"]) == (1, 2, 4.0)


def test_no_tolerance_at_all_gives_valid_json(goldens):
    results = parity.run_parity(goldens("wrong", {"y": X * 3}, atol=0.0))
    assert json.loads(parity.to_json(results))["cases"][0]["outputs"][0]["excess"] is None
