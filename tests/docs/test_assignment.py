"""The checker of docs/assignment: it accepts the reference, and names every misreading that it knows."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from docs.assignment import check, expected
from docs.assignment.grading import Result, grade
from docs.assignment.misreadings import MISREADINGS
from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import replaced
from docs.assignment.steps import STEPS, Step, closure
from docs.assignment.student import Student
from tests.docs import assignment_solution

ROOT = Path(__file__).parents[2]
ASSIGNMENT = ROOT / "docs" / "assignment"
SOLUTION = Path(assignment_solution.__file__)
BY_NAME = {step.name: step for step in STEPS}


def mutant(*misreadings: Misreading) -> Student:
    """A student whose functions are the reference's with these misreadings."""
    student = Student(SOLUTION)
    functions = [name for step in STEPS for name in step.functions]
    student.module = SimpleNamespace(
        **{
            name: getattr(assignment_solution, name)
            for name in ("BatchNorm", "ConvNorm", "SeparableConv", "CellWeights", "Branch")
        },
        **{name: misread(name, misreadings) for name in functions},
    )
    return student


def misread(name: str, misreadings: tuple[Misreading, ...]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        given = [assignment_solution.reference_cell(each) if is_cell(each) else each for each in arguments]
        return within(misreadings, lambda: expected.function(name)(*given, **options))

    return function


def is_cell(argument: Any) -> bool:
    return isinstance(argument, list) and hasattr(argument[0], "operation")


def within(misreadings: tuple[Misreading, ...], call: Callable[[], Any]) -> Any:
    if not misreadings:
        return call()
    with replaced(misreadings[0].changes):
        return within(misreadings[1:], call)


def names(result: Result) -> list[list[str]]:
    return [[part.name for part in each] for each in result.misreadings]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_reference_passes(step: Step) -> None:
    result = grade(Student(SOLUTION), step, [])
    assert (result.status, result.sentences, result.remarks) == ("passed", [], [])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_stubs_are_not_yet_written(step: Step) -> None:
    assert grade(Student(ASSIGNMENT / "dpc.py"), step, []).status == "not yet written"


@pytest.mark.parametrize("misreading", MISREADINGS, ids=lambda misreading: misreading.name)
def test_each_misreading_is_named(misreading: Misreading) -> None:
    result = grade(mutant(misreading), BY_NAME[misreading.step], [])
    assert result.status == "failed"
    assert set(map(tuple, names(result))) == {(misreading.name,)}
    assert any(f"what one gets {misreading.gives}; {misreading.instead}." in sentence for sentence in result.sentences)


IN_THE_WHOLE_CELL = (
    "eps_1e_3",
    "edge_padding",
    "no_relu_in_the_middle",
    "half_pixel",
    "resized_before_norm",
    "branches_reversed",
)


@pytest.mark.parametrize("name", IN_THE_WHOLE_CELL)
def test_misreadings_of_a_part_are_named_in_the_whole_cell(name: str) -> None:
    misreading = by_name(name)
    assert misreading.step in closure(BY_NAME["cell"]) - {"cell"}
    assert names(grade(mutant(misreading), BY_NAME["cell"], [])) == [[name]]


def test_what_was_named_before_is_recognised() -> None:
    misreading = by_name("eps_1e_3")
    student, known = mutant(misreading), list[Any]()
    assert names(grade(student, BY_NAME["batch_norm"], known)) == [["eps_1e_3"], ["eps_1e_3"]]
    assert known == [misreading]
    result = grade(student, BY_NAME["conv1x1"], known)
    assert "As before, this is what one gets with ε = 1e-3." in result.sentences
    assert known == [misreading]


PAIRS = (
    ("batch_norm", "eps_1e_3", "no_relu"),
    ("batch_norm", "biased_running_variance", "momentum_is_decay"),
    ("depthwise", "kernel_flipped", "rate_swapped"),
    ("separable", "no_relu_in_the_middle", "edge_padding"),
    ("pooling", "window_rounded_down", "half_pixel"),
    ("pooling", "window_rounded_to_nearest", "resized_before_norm"),
    ("pooling", "grid_swapped", "unbiased_variance_normalises"),
    ("project", "branches_reversed", "dropout_not_rescaled"),
    ("loss", "divided_by_all_pixels", "half_pixel"),
    ("score", "only_labelled_classes", "dice"),
    ("batch_norm_gradient", "no_mean_term", "mask_of_the_norms_input"),
    ("loss_gradient", "gradient_resized_down", "loss_gradient_not_divided"),
)


@pytest.mark.parametrize(("step", "first", "second"), PAIRS)
def test_two_at_once_are_named(step: str, first: str, second: str) -> None:
    result = grade(mutant(by_name(first), by_name(second)), BY_NAME[step], [])
    assert {first, second} in [set(each) for each in names(result)]


def by_name(name: str) -> Misreading:
    (found,) = (misreading for misreading in MISREADINGS if misreading.name == name)
    return found


def test_replaced_functions_are_put_back() -> None:
    x = np.arange(6.0).reshape(1, 1, 2, 3)
    before = expected.function("bilinear_resize")(x, (3, 4))

    def raising() -> None:
        with replaced(by_name("half_pixel").changes):
            assert not np.allclose(expected.function("bilinear_resize")(x, (3, 4)), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raising()
    np.testing.assert_array_equal(expected.function("bilinear_resize")(x, (3, 4)), before)


# What goes wrong in students' files. Each is the stubs with some functions written, one of them badly.

NORM = """
def batch_norm(x, norm, *, training):
    if training and x[:, 0].size > 1:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = norm.scale / np.sqrt(var + EPS)
    return x * scale[:, None, None] + (norm.offset - mean * scale)[:, None, None]

def batch_norm_relu(x, norm, *, training):
    return np.maximum(batch_norm(x, norm, training=training), 0)
"""
RESIZE = """
def bilinear_resize(x, size):
    for axis in (2, 3):
        at = np.linspace(0, x.shape[axis] - 1, size[axis - 2]) if size[axis - 2] > 1 else np.zeros(1)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        share = (at - low).reshape((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        x = (1 - share) * np.take(x, low, axis) + share * np.take(x, high, axis)
    return x
"""
WRONG = {
    "in place": (
        "batch_norm",
        NORM.replace("    scale =", "    x -= mean[:, None, None]\n    scale ="),
        "changes its argument x",
    ),
    "a recursion": (
        "resize",
        "def bilinear_resize(x, size):\n    return bilinear_resize(x, size)",
        "calls itself without end",
    ),
    "an exception": (
        "resize",
        "def bilinear_resize(x, size):\n    rows = x.shape[2]\n    return x[rows:, 17, rows]",
        "raises IndexError in line {line} of student.py, `return x[rows:, 17, rows]`: index 17 is out of bounds",
    ),
    "an exit": ("resize", "def bilinear_resize(x, size):\n    raise SystemExit(0)", "raises SystemExit"),
    "nothing returned": ("resize", "def bilinear_resize(x, size):\n    x = x + 1", "is None: is a `return` missing?"),
    "one of two": (
        "conv1x1_gradient",
        "def pointwise_conv_backward(grad_output, x, weight):\n    return [x]",
        "The result has 1 parts, and needs 2.",
    ),
    "no tuple": (
        "conv1x1_gradient",
        "def pointwise_conv_backward(grad_output, x, weight):\n    return None",
        "The result is None (is a `return` missing?), and has to be a tuple of 2.",
    ),
    "another signature": (
        "depthwise",
        "def depthwise_conv(x, weight):\n    return x",
        "cannot be called as its stub says: TypeError",
    ),
    "a shape": (
        "resize",
        RESIZE.replace("return x\n", "return x.transpose(0, 2, 3, 1)\n"),
        "has shape (1, 5, 9, 2), expected (1, 2, 5, 9): the axes are in another order",
    ),
    "NaN": (
        "resize",
        RESIZE.replace("return x\n", "return x * np.nan\n"),
        "has 90 of 90 values NaN or infinite, the first at [0, 0, 0, 0]",
    ),
    "integers": ("resize", RESIZE.replace("return x\n", "return x.astype(int)\n"), "holds integers (int64)"),
    "float32": ("resize", RESIZE.replace("return x\n", "return x.astype(np.float32)\n"), "float32: maps are float64"),
    "float32 inside": (
        "resize",
        RESIZE.replace("return x\n", "return x.astype(np.float32).astype(float)\n"),
        "All values are numbers of float32: is something computed in it?",
    ),
    "words": ("resize", "def bilinear_resize(x, size):\n    return 'done'", "has to be an array of real numbers"),
    "ragged lists": (
        "resize",
        "def bilinear_resize(x, size):\n    return [[1.0], 2.0]",
        "the result is of type list, which is no array",
    ),
    "a list that contains itself": (
        "conv1x1_gradient",
        "def pointwise_conv_backward(grad_output, x, weight):\n    y = []\n    y.append(y)\n    return y",
        "the result cannot be compared (RecursionError)",
    ),
    "a factor": ("resize", RESIZE.replace("return x\n", "return 2 * x\n"), "Every value is 2 times what is expected."),
    "rows reversed": (
        "resize",
        RESIZE.replace("return x\n", "return x[:, :, ::-1]\n"),
        "right but for the order of the rows",
    ),
    "zeros": ("resize", "def bilinear_resize(x, size):\n    return np.zeros((*x.shape[:2], *size))", "All values are 0."),
    "a function gone": ("resize", "del bilinear_resize", "has no function bilinear_resize"),
    "a container gone": ("batch_norm", NORM + "\ndel BatchNorm", "The container BatchNorm at the top of student.py"),
    "float32 in between": (
        "resize",
        RESIZE.replace("return x\n", "return 3.0 * (x / 3.0).astype(np.float32).astype(float)\n"),
        "So small an error may be the rounding of float32",
    ),
    "a cell that is not read": ("cell", "def read_cell(text):\n    return []", "read_cell"),
}


def written(folder: Path, *functions: str) -> Path:
    path = folder / "student.py"
    path.write_text("\n".join([(ASSIGNMENT / "dpc.py").read_text(encoding="utf-8"), *functions]), encoding="utf-8")
    return path


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(what: str, tmp_path: Path) -> None:
    step, code, said = WRONG[what]
    path = written(tmp_path, code)
    line = len(path.read_text(encoding="utf-8").splitlines())
    result = grade(Student(path), BY_NAME[step], [])
    assert result.status == "failed"
    assert any(said.format(line=line) in sentence for sentence in result.sentences), result.sentences


READ = """
def read_cell(text):
    import json
    kinds = {{"1": "conv1x1", "3": "atrous_separable_conv", "None": "pyramid_pooling"}}
    cell = []
    for i, branch in enumerate(json.loads(text)):
        if {refused}:
            raise ValueError(branch["input"])
        kind = kinds[str(branch.get("kernel")).strip("[]")[:1].replace("N", "None")]
        size = branch.get("rate") or branch.get("grid_size") or (1, 1)
        cell.append(Branch(kind, tuple(size), branch["input"]))
    return cell
"""


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("False", "read_cell accepts an input that is a later branch"),
        ("branch['input'] > i", "read_cell accepts an input that is the branch itself"),
        ("branch['input'] >= i", "read_cell accepts an input below -1"),
        ("not -1 <= branch['input'] < i", ""),
    ],
)
def test_inputs_that_are_no_earlier_map_have_to_be_refused(refused: str, said: str, tmp_path: Path) -> None:
    student = Student(written(tmp_path, READ.format(refused=refused)))
    result = grade(student, only(BY_NAME["cell"], "read_cell"), [])
    assert (result.status, bool(result.sentences)) == (("failed", True) if said else ("passed", False))
    assert all(sentence.startswith(said) and "it has to raise ValueError" in sentence for sentence in result.sentences)


def only(step: Step, function: str) -> Step:
    """The step with the cases of one of its functions."""
    cases = [case for case in step.cases() if case.function == function]
    return step._replace(cases=lambda: cases)


def changed(name: str, change: Callable[[Any], Any]) -> Misreading:
    """A mutant that the check does not know."""
    return Misreading("unknown", "pooling", "", "", {name: change})


def test_a_window_that_exceeds_the_map_has_to_be_refused() -> None:
    def clipped(size: int, grid: int, pooling_size: int | None = None) -> int:
        return min(-(-(pooling_size or size) // grid), size)

    result = grade(mutant(changed("pyramid_pooling.window_size", lambda f: clipped)), BY_NAME["pooling"], [])
    assert result.status == "failed"
    assert [sentence[:61] for sentence in result.sentences] == [
        "pyramid_pooling accepts a window with more rows than the map:"
    ]


@pytest.mark.parametrize(
    "name", ["one_value_has_batch_terms", "relu_passes_at_0", "one_value_per_image", "dropout_in_inference"]
)
def test_what_is_off_on_special_inputs_alone_is_found(name: str) -> None:
    """All the other inputs of its step, it gets right."""
    result = grade(mutant(by_name(name)), BY_NAME[by_name(name).step], [])
    assert result.points == 0
    assert any("inputs give the right value" in sentence for sentence in result.sentences)


def test_a_single_number_has_no_factor() -> None:
    loss = mutant(changed("upsampled_cross_entropy.upsampled_cross_entropy", lambda f: lambda *given: 1.03 * f(*given)))
    result = grade(loss, BY_NAME["loss"], [])
    assert result.status == "failed"
    assert not any("times what is expected" in sentence for sentence in result.sentences)


@pytest.mark.parametrize("factor", [1.1, 1.001])
def test_a_factor_that_batch_norm_hides_is_not_float32(factor: float) -> None:
    """Dropout's factor, squared or nearly right."""
    dropout = changed("concat_project.dropout", lambda f: lambda x, keep, *, rate: factor * f(x, keep, rate=rate))
    sentences = grade(mutant(dropout), BY_NAME["project"], []).sentences
    assert any("does dropout multiply what it keeps by 1 / (1 - DROPOUT_RATE)?" in sentence for sentence in sentences)
    assert not any("float32" in sentence or "times what" in sentence for sentence in sentences)


def test_a_loss_of_float32_is_said_to_be_one() -> None:
    loss = mutant(
        changed("upsampled_cross_entropy.upsampled_cross_entropy", lambda f: lambda *given: float(np.float32(f(*given))))
    )
    assert "All values are numbers of float32" in grade(loss, BY_NAME["loss"], []).sentences[1]


def test_nothing_is_named_that_right_values_contradict() -> None:
    """A ReLU without a gradient only in inference: `no_mask` gives just this value there, but is wrong in training."""

    def without_relu_in_inference(original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*given: Any, training: bool) -> Any:
            gradient = original if training else expected.function("batch_norm_backward")
            return gradient(*given, training=training)

        return backward

    misread = changed("batch_norm.batch_norm_relu_backward", without_relu_in_inference)
    step = only(BY_NAME["batch_norm_gradient"], "batch_norm_relu_backward")
    result = grade(mutant(misread), step, [])
    assert (result.status, result.misreadings) == ("failed", [])


def test_what_an_earlier_step_did_not_show_is_not_named_later() -> None:
    student, step = mutant(by_name("window_rounded_down")), BY_NAME["cell"]
    assert names(grade(student, step, [])) == [["window_rounded_down"]]
    result = grade(student, step, [], ["pooling"])
    assert (result.misreadings, result.sentences[-1]) == ([], "It needs pooling, off too: put that right first.")
    assert names(grade(student, step, [by_name("window_rounded_down")], ["pooling"])) == [["window_rounded_down"]]


def test_a_relu_before_norm_is_recognised_in_the_cells_statistics() -> None:
    """A student's statistics are of what the convolution gives; a mean of them alone would fit other misreadings too."""
    misreading = by_name("relu_before_norm")
    result = grade(mutant(misreading), BY_NAME["published_cell"], [misreading], ["batch_norm"])
    assert names(result)
    assert {tuple(each) for each in names(result)} == {("relu_before_norm",)}


def test_a_view_is_remarked(tmp_path: Path) -> None:
    view = RESIZE.replace(
        "    for axis", "    if x.shape[2:] == (1, 1):\n        return np.broadcast_to(x, x.shape[:2] + size)\n    for axis"
    )
    result = grade(Student(written(tmp_path, view)), BY_NAME["resize"], [])
    assert result.status == "passed"
    assert len(result.remarks) == 1
    assert "bilinear_resize returns a view of its argument x" in result.remarks[0]


def test_a_loop_without_end_is_stopped(tmp_path: Path) -> None:
    path = written(tmp_path, "def bilinear_resize(x, size):\n    while True:\n        pass")
    result = grade(Student(path, limit_s=0.2), BY_NAME["resize"], [])
    assert "was stopped after 0 s in line" in result.sentences[0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    conv = "def conv1x1(x, weights, *, training):\n    return batch_norm_relu(pointwise_conv(x, weights.weight), weights.norm)"
    result = grade(Student(written(tmp_path, conv)), BY_NAME["conv1x1"], [])
    assert result.status == "not yet written"
    assert result.sentences == ["pointwise_conv", "pointwise_conv, which conv1x1 calls"]


NORM_GRADIENT = """
def batch_norm_backward(grad_output, x, norm, *, training):
    y = batch_norm(x, norm, training=training)
    return {factor} * grad_output * y, BatchNorm((grad_output * y).sum((0, 2, 3)), grad_output.sum((0, 2, 3)), 0, 0)
"""


def test_a_gradient_is_held_to_the_students_own_function(tmp_path: Path) -> None:
    path = written(tmp_path, NORM, NORM_GRADIENT.format(factor=1.5))
    result = grade(Student(path), BY_NAME["batch_norm_gradient"], [])
    assert any("Central differences of your own batch_norm do not agree with grad_x" in each for each in result.sentences)
    later = grade(Student(path), BY_NAME["batch_norm_gradient"], [], ["batch_norm"])
    assert later.sentences[-1] == "It needs batch_norm, off too: put that right first."
    assert not any("Central differences" in each for each in later.sentences)


def test_a_gradient_of_a_wrong_function_sends_there(tmp_path: Path) -> None:
    pointwise = "def pointwise_conv(x, weight):\n    return 3.0 * np.einsum('nchw,oc->nohw', x, weight[:, :, 0, 0])"
    gradient = """
def pointwise_conv_backward(grad_output, x, weight):
    grad_x = 3.0 * np.einsum("nohw,oc->nchw", grad_output, weight[:, :, 0, 0])
    return grad_x, 3.0 * np.einsum("nohw,nchw->oc", grad_output, x)[:, :, None, None]
"""
    result = grade(Student(written(tmp_path, pointwise, gradient)), BY_NAME["conv1x1_gradient"], [])
    assert (
        "It is the gradient of your own pointwise_conv, as central differences say: so look at pointwise_conv first."
        in result.sentences
    )


def test_what_comes_of_an_earlier_step_is_said(tmp_path: Path) -> None:
    median = NORM.replace("x.mean((0, 2, 3))", "np.median(x, (0, 2, 3))")
    conv = """
def pointwise_conv(x, weight):
    return np.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0])

def conv1x1(x, weights, *, training):
    return batch_norm_relu(pointwise_conv(x, weights.weight), weights.norm, training=training)
"""
    student = Student(written(tmp_path, median, conv))
    result = grade(student, BY_NAME["conv1x1"], [], ["batch_norm", "resize"])
    assert result.sentences[-1] == "It needs batch_norm, off too: put that right first."
    assert grade(Student(SOLUTION), BY_NAME["conv1x1"], [], ["batch_norm"]).status == "passed"


def test_branches_left_out_are_counted(tmp_path: Path) -> None:
    cell = """
def concat_project(branches, weights, *, training, dropout_keep=None):
    return np.concatenate(branches, axis=1) @ weights.weight

def dense_prediction_cell(features, cell, weights, *, training, **options):
    read = {branch.input_index for branch in cell}
    return concat_project([features for i in range(len(cell)) if i not in read], weights.projection, training=training)
"""
    result = grade(Student(written(tmp_path, cell)), BY_NAME["cell"], [])
    assert any("Your cell gives concat_project 3 of its 5 branches" in sentence for sentence in result.sentences)


def test_two_that_cannot_be_told_apart_are_both_named() -> None:
    """In inference a resize and batch norm may be swapped."""
    step = BY_NAME["pooling"]
    inference = [case for case in step.cases() if not case.options["training"]][:1]
    result = grade(mutant(by_name("resized_before_relu")), step._replace(cases=lambda: inference), [])
    assert "This is what one gets with the resize before the ReLU;" in result.sentences[-1]
    assert "(Or with the resize before convolution or batch norm:" in result.sentences[-1]


# The command


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ASSIGNMENT / "check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_exit_status_and_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(SOLUTION)]) == 0
    said = capsys.readouterr().out
    assert "100 of 100 points. This computes what the authors' code does." in said
    wrong = written(tmp_path, NORM.replace("EPS", "1e-3"), RESIZE)
    assert check.main([str(wrong), "--only", "batch_norm", "--only", "5"]) == 1
    wrongly = capsys.readouterr().out
    assert "1 batch_norm FAILED 0/6" in " ".join(wrongly.split())
    assert "This is what one gets with ε = 1e-3; the cell uses 1e-5." in " ".join(wrongly.split())
    assert "5 of 11 points. Next: batch_norm, docs/definitions.md#batch-norm-and-relu" in wrongly
    lines = (said + wrongly).splitlines()
    assert max(len(line) for line in lines if not line.startswith("Dense Prediction Cell, ")) < 80


def test_json_is_one_object_whatever_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "print('hello')", NORM.replace("EPS", "1e-3"), "from reference.cell import Cell")
    assert check.main([str(path), "--only", "batch_norm", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["steps"][0]["errors"]["reference"] > 0
    assert (report["points"], report["of"], report["uses"]) == (0, 6, ["reference"])
    assert report["steps"][0]["status"] == "failed"
    assert report["steps"][0]["misreadings"][0] == ["eps_1e_3"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:\n    pass", "student.py is not valid Python: invalid syntax, line 1: `def f(:`"),
        ("import no_such_library", "raises ModuleNotFoundError in line 1 of student.py, `import no_such_library`"),
        ("raise NotImplementedError", "raises NotImplementedError while it is loaded"),
    ],
)
def test_files_that_cannot_be_loaded(code: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "student.py"
    path.write_text(code, encoding="utf-8")
    assert check.main([str(path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "norm"], "no step 'norm'; the steps are batch_norm, conv1x1"),
        (["no_file.py"], "there is no file no_file.py"),
    ],
)
def test_commands_that_are_not_understood(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main(arguments)
    assert said in capsys.readouterr().err


def test_from_another_folder_in_a_narrow_alphabet(tmp_path: Path) -> None:
    written(tmp_path, NORM.replace("EPS", "1e-3"), "def pointwise_conv(x, weight):\n    return x / [1, 2, 3, 4, 5, 6, 7]")
    result = run("student.py", "--only", "1", "--only", "2", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (1, "")
    assert "with ? = 1e-3" in result.stdout
    assert "of student.py, `return x / [1, 2, 3, 4, 5, 6, 7]`: operands could not be broadcast" in " ".join(
        result.stdout.split()
    )


def test_json_is_an_object_for_a_file_that_cannot_be_loaded_too(tmp_path: Path) -> None:
    (path := tmp_path / "dpc.py").write_text("def f(:\n", encoding="utf-8")
    result = run(str(path), "--only", "resize", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report == {
        "file": str(path),
        "error": result.stderr.strip().removeprefix("error: "),
        "points": 0,
        "of": 5,
        "steps": [],
    }


def test_ways_around_the_rules_are_named(tmp_path: Path) -> None:
    (path := tmp_path / "dpc.py").write_text("import sys\nSOLUTION = [m for m in sys.modules]\nexec('')\n", encoding="utf-8")
    result = run(str(path), "--only", "resize", "--json")
    assert json.loads(result.stdout)["uses"] == ["exec", "sys.modules"]


def test_json_has_no_infinity(tmp_path: Path) -> None:
    path = written(tmp_path, "def bilinear_resize(x, size):\n    import torch_of_mine as x\n    return x")
    result = run(str(path), "--only", "resize", "--json")
    assert json.loads(result.stdout)["uses"] == ["torch_of_mine"]
    path = written(tmp_path, "def bilinear_resize(x, size):\n    return x.copy()")
    result = run(str(path), "--only", "resize", "--json")
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["steps"][0]["errors"] == {"reference": None}
    assert result.returncode == 1


def test_what_has_to_be_there_first() -> None:
    assert check._missing((3, 10)) == "Python 3.11 or newer is needed, this is 3.10"
    assert check._missing((3, 11)) == ""
    command = [sys.executable, "-S", str(ASSIGNMENT / "check.py")]  # -S: no installed packages
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: NumPy is missing: pip install numpy\n"


BLOCKER = """
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "reference", "docs", "tests", "student"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_numpy_is_all_that_is_needed(tmp_path: Path) -> None:
    """From another folder, with installed packages of the names that the clone's folders have."""
    for name in ("docs", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the installed one')", encoding="utf-8")
    command = [sys.executable, "-c", BLOCKER, str(ASSIGNMENT / "check.py"), str(SOLUTION)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "100 of 100 points" in result.stdout


def test_the_page_names_every_step_with_its_points() -> None:
    page = (ASSIGNMENT / "README.md").read_text(encoding="utf-8")
    assert f" {len(MISREADINGS)} likely misreadings" in page
    assert sum(step.points for step in STEPS) == 100
    for number, step in enumerate(STEPS, 1):
        row = f"| {number} | `{step.name}` | {step.points} | {step.minutes} | [{{}}](../definitions.md#{step.anchor})"
        start, end = row.split("{}")
        assert any(line.startswith(start) and end in line for line in page.splitlines()), row


def test_every_stub_is_asked_for_once() -> None:
    stubs = (ASSIGNMENT / "dpc.py").read_text(encoding="utf-8").count("\ndef ")
    functions = [function for step in STEPS for function in step.functions]
    assert len(functions) == len(set(functions)) == stubs
    cases = {case.function for step in STEPS for case in step.cases()}
    assert cases == set(functions)
