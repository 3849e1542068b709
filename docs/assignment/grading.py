"""Calls a student's functions on the cases of a step, compares, and says in sentences what is off."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from docs.assignment.misreadings import MISREADINGS
from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import replaced
from docs.assignment.steps import FLOAT64, STEPS, Bound, Case, Step, closure
from docs.assignment.student import Fault, NotWrittenError, Student, leaves, without_running

ROUNDING = 1e-12  # of sums that are 0 but for that, such as the gradient of an offset that a batch norm takes away again
PAIRED_ELEMENTS = 3000  # pairs of misreadings are tried on inputs of at most so many elements, in some seconds
Status = Literal["passed", "failed", "not yet written"]
Explanation = tuple[Misreading, ...]  # at once: those of earlier steps, and up to two new ones

DIFFERENCES_STEP, DIFFERENCES_BOUND = 1e-6, 1e-4  # of central differences; a wrong term is off by more


class Result(NamedTuple):
    """What became of one step."""

    step: Step
    status: Status
    errors: dict[str, float]  # the largest relative error, by whose values: "authors" or "reference"
    sentences: list[str]
    misreadings: list[Explanation]
    remarks: list[str]

    @property
    def points(self) -> int:
        """All of the step's, or none."""
        return self.step.points if self.status == "passed" else 0


class Off(NamedTuple):
    """One array of a result that is not as expected."""

    where: str  # how one gets to it
    sentence: str
    value: Any  # the student's array if it has the right shape, else None
    expected: Any


class Answer(NamedTuple):
    """One case, and what the student's function did with it."""

    case: Case
    value: Any
    error: float
    off: Off | None


def grade(student: Student, step: Step, known: list[Misreading], failed: Sequence[str] = ()) -> Result:
    """Check one step. `known` are the misreadings of earlier steps, which are tried first; new ones are added to it.

    `failed` are the names of earlier steps that are off.
    """
    answers: list[Answer] = []
    faults: dict[str, str] = {}  # the first one of each function
    missing: list[str] = []
    remarks: list[str] = []
    for case in step.cases():
        if case.function in faults:
            continue
        try:
            value, new = student.call(case.function, case.arguments, case.options)
            if case.is_refused:
                faults[case.function] = f"{case.function} accepts {case.says}: it has to raise ValueError."
                continue
            remarks += [remark for remark in new if remark not in remarks]
            answers.append(_compared(case, value))
        except NotWrittenError as error:
            name = str(error)
            missing.append(name if name == case.function else f"{name}, which {case.function} calls")
        except Fault as fault:
            if not (case.is_refused and isinstance(fault.cause, ValueError)):
                faults[case.function] = f"{_called(case)}: {fault}"
        except Exception as error:  # of the comparison: of a list that contains itself, say
            faults[case.function] = f"{_called(case)}: the result cannot be compared ({type(error).__name__})."
    errors: dict[str, float] = {}
    for answer in answers:
        source = "reference" if answer.case.authors_value is None else "authors"
        errors[source] = max(errors.get(source, 0.0), answer.error)
    sentences: list[str] = []
    named: list[Explanation] = []
    if "dense_prediction_cell" in faults or any(a.case.function == "dense_prediction_cell" and a.off for a in answers):
        sentences += _left_out(student, step)
    for function in dict.fromkeys(answer.case.function for answer in answers if answer.off):
        its_own = [answer for answer in answers if answer.case.function == function]
        about, explanation = _explained(student, step, its_own, known, failed)
        sentences += about
        named += [explanation] if explanation else []
    sentences += faults.values()
    if sentences and not named:
        sentences += _needed(step, failed)
    if sentences:
        return Result(step, "failed", errors, sentences, named, remarks)
    if missing:
        return Result(step, "not yet written", errors, list(dict.fromkeys(missing)), [], remarks)
    return Result(step, "passed", errors, [], [], remarks)


def _needed(step: Step, failed: Sequence[str]) -> list[str]:
    """Said where earlier steps are off: those of them that need no other one."""
    by_name = {each.name: each for each in STEPS}
    needed = [name for name in failed if name in closure(step)]
    first = [name for name in needed if closure(by_name[name]) & {*needed} == {name}]
    return [f"It needs {' and '.join(first)}, off too: put that right first."] if first else []


# Comparison


def _compared(case: Case, value: Any) -> Answer:
    error, off = 0.0, None
    for where, wanted, given in _pairs(case, case.value(), value):
        leaf_error, leaf_off = _difference(where, wanted, given, case.bound)
        error, off = max(error, leaf_error), off or leaf_off
    return Answer(case, value, error, off)


def _pairs(case: Case, wanted: Any, given: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Expected and given arrays of a result, by the expected one's structure. Raises Fault where the given one has another."""
    if not isinstance(wanted, list | tuple):
        yield where or "the result", wanted, given
        return
    top = not where
    if not isinstance(given, list | tuple):
        raise Fault(f"{where or 'The result'} is {_kind(given)}, and has to be a {type(wanted).__name__} of {len(wanted)}.")
    if len(given) != len(wanted):
        raise Fault(f"{where or 'The result'} has {len(given)} parts, and needs {len(wanted)}.")
    fields = getattr(wanted, "_fields", None)
    if fields and fields[-1] == "output":
        fields = ("branches", "projection")
    for i, (child, given_child) in enumerate(zip(wanted, given, strict=True)):
        name = case.returns[i] if top and case.returns else f".{fields[i]}" if fields else f"[{i}]"
        if not case.function.endswith("_backward") or without_running(where + name):
            yield from _pairs(case, child, given_child, where + name)


def _difference(where: str, wanted: Any, given: Any, bound: Bound) -> tuple[float, Off | None]:
    """The largest relative error of one array, and what is to be said if that is too much."""

    def off(sentence: str, array: Any = None) -> tuple[float, Off]:
        return np.inf, Off(where, f"{where} {sentence}", array, wanted)

    if isinstance(wanted, str):
        return (0.0, None) if isinstance(given, str) and given == wanted else off(f"is {given!r}, expected {wanted!r}")
    if given is None:
        return off("is None: is a `return` missing?")
    try:
        array = np.asarray(given)
    except Exception:
        return off(f"is {_kind(given)}, which is no array")
    expected = np.asarray(wanted)
    if array.dtype.kind not in "fiub":
        return off(f"is {_kind(given)} (dtype {array.dtype}), and has to be an array of real numbers")
    if array.shape != expected.shape:
        return off(f"has shape {array.shape}, expected {expected.shape}{_axes(array.shape, expected.shape)}")
    if expected.dtype.kind == "f" and array.dtype.kind != "f":
        return off(f"holds integers ({array.dtype}), which cut off what comes after the point: make it float64")
    finite = np.isfinite(array)
    if not finite.all():
        first = _index(np.argwhere(~finite)[0])
        return off(f"has {np.count_nonzero(~finite)} of {array.size} values NaN or infinite, the first{first}", array)
    errors = np.abs(array.astype(np.float64) - expected)
    largest = float(np.abs(expected).max(initial=0.0))
    error = float(errors.max(initial=0.0)) / (largest or 1.0)
    allowed = bound.absolute + bound.relative * largest
    wrong = ~(errors <= allowed)
    if not wrong.any():
        if array.dtype.kind == "f" and array.dtype != np.float64 and expected.dtype.kind == "f":
            return error, Off(where, f"is right but in {array.dtype}: maps are float64", None, wanted)
        return error, None
    index = np.argwhere(wrong)[0]
    at = tuple(index)
    count = f", in {np.count_nonzero(wrong)} of {array.size} values" if array.ndim else ""
    limit = f" (allowed: {allowed:.1g})" if expected.dtype.kind == "f" else ""
    sentence = (
        f"is off by up to {errors.max():.2g}{limit}{count}{_narrowed(wrong)}. "
        f"{'The first' if array.ndim else 'It'}{_index(index)} is {_numbers(array[at], expected[at])}"
    )
    return error, Off(where, f"{where} {sentence}", array, wanted)


def _kind(value: Any) -> str:
    return "None (is a `return` missing?)" if value is None else f"of type {type(value).__name__}"


def _axes(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A hint where the axes are there in another order."""
    return ": the axes are in another order" if sorted(given) == sorted(wanted) else ""


def _index(index: Any) -> str:
    return f" at [{', '.join(str(int(i)) for i in index)}]" if len(index) else ""


def _numbers(given: Any, wanted: Any) -> str:
    """Both, with as many digits as tell them apart."""
    texts = ((f"{float(given):.{digits}g}", f"{float(wanted):.{digits}g}") for digits in (6, 9, 12, 17))
    return next((f"{a}, expected {b}" for a, b in texts if a != b), f"{given!r}, expected {wanted!r}")


def _narrowed(wrong: Any) -> str:
    """Said where all wrong values of a map lie in one image, channel, row or column."""
    if wrong.ndim != 4 or wrong.all():
        return ""
    for axis, name in enumerate(("image", "channel", "row", "column")):
        others = tuple(i for i in range(4) if i != axis)
        hit = np.flatnonzero(wrong.any(axis=others))
        if len(hit) == 1 and wrong.shape[axis] > 1:
            return f", all in {name} {hit[0]}"
    return ""


# Explanation


def _explained(
    student: Student, step: Step, answers: list[Answer], known: list[Misreading], failed: Sequence[str]
) -> tuple[list[str], Explanation | None]:
    """Sentences about one function, and the misreading that it shows, if there is one."""
    first_off = next(answer for answer in answers if answer.off)
    off = first_off.off
    assert off is not None
    right = sum(answer.off is None for answer in answers)
    about = f"{_called(first_off.case)}: {off.sentence}."
    if right:
        about += f" ({right} of {len(answers)} inputs give the right value.)"
    if off.value is None:
        return [about], None
    found = [_least(each, first_off, off) for each in _named(step, answers, first_off, off, known, failed)]
    if not found:
        return [about, *_hints(student, first_off, off, is_first=not _needed(step, failed))], None
    sentence = _sentence(found, known)
    known += [each for each in found[0] if each not in known]
    return [about, sentence], found[0]


def _named(
    step: Step, answers: list[Answer], first_off: Answer, off: Off, known: list[Misreading], failed: Sequence[str]
) -> list[Explanation]:
    """What gives all that the function returned: the known misreadings, with at most two new ones, or new ones alone.

    What explains all inputs that are off is looked for first; then what explains one, and else the array that is off. Nothing
    is named that would make a right value wrong, nor a misreading of an earlier step that failed without showing it. The
    likeliest comes first.
    """
    steps = closure(step)
    possible = [each for each in MISREADINGS if each.step in steps and (each in known or each.step not in failed)]
    candidates = sorted(possible, key=lambda each: each.step != step.name)
    before = tuple(each for each in known if each in candidates)
    partly: list[Explanation] = []
    for group in _groups(step.name, before, candidates, first_off):
        found = [each for each in group if _gives_all(each, first_off) and not _contradicted(each, answers)]
        fully = [each for each in found if all(_gives_all(each, answer) for answer in answers if answer.off)]
        if fully:
            return fully
        partly = partly or [each for each in found if len({*each} - {*before}) < 2]
    return partly or [
        (each,) for each in candidates if _gives((each,), first_off, off) and not _contradicted((each,), answers)
    ]


def _groups(own: str, before: Explanation, candidates: list[Misreading], first_off: Answer) -> Iterator[list[Explanation]]:
    """What to try, from the likeliest on. The candidates begin with the step's own ones."""
    bases = [before, ()] if before else [()]
    yield [before] if before else []
    for base in bases:
        yield [(*base, each) for each in candidates if each not in base]
    size = sum(leaf.size for _, leaf in leaves(first_off.case.arguments) if isinstance(leaf, np.ndarray))
    if size > PAIRED_ELEMENTS:
        return
    right = first_off._replace(value=first_off.case.evaluated())
    changing = [each for each in candidates if not _gives_all((each,), right)]
    pairs = [pair for pair in combinations(changing, 2) if pair[0].step == own]  # two of earlier steps were named there
    for base in bases:
        yield [(*base, *pair) for pair in pairs if not {*pair} & {*base}]


def _contradicted(explanation: Explanation, answers: list[Answer]) -> bool:
    """Whether it would be off where the student is right."""
    for answer in answers:
        if answer.off:
            continue
        mutant = _evaluated(explanation, answer.case)
        try:
            if mutant is None or _compared(answer.case, mutant).off:
                return True
        except Fault:
            return True
    return False


def _least(explanation: Explanation, answer: Answer, off: Off) -> Explanation:
    """Without the misreadings that have no part in the value: those known from earlier steps are tried all together."""
    gives = _gives_all(explanation, answer)
    for each in explanation:
        rest = tuple(other for other in explanation if other is not each)
        if rest and (_gives_all(rest, answer) if gives else _gives(rest, answer, off)):
            explanation = rest
    return explanation


def _evaluated(explanation: Explanation, case: Case) -> Any:
    """The reference's result with these misreadings, or None where it has none: sizes that do not fit, say."""
    try:
        with np.errstate(all="ignore"):
            return _under(explanation, case)
    except Exception:
        return None


def _under(explanation: Explanation, case: Case) -> Any:
    if not explanation:
        return case.evaluated()
    with replaced(explanation[0].changes):
        return _under(explanation[1:], case)


def _gives(explanation: Explanation, answer: Answer, off: Off) -> bool:
    """Whether the array that is off has exactly this value, and with it the others of its container, say of its batch norm."""
    mutant = _evaluated(explanation, answer.case)
    container = off.where.rpartition(".")[0]
    try:
        pairs = [] if mutant is None else list(_pairs(answer.case, mutant, answer.value))
    except Fault:
        return False
    near = [
        _equal(value, given)
        for where, value, given in pairs
        if where == off.where or (container and where.rpartition(".")[0] == container)
    ]
    return bool(near) and all(near)


def _gives_all(explanation: Explanation, answer: Answer) -> bool:
    mutant = _evaluated(explanation, answer.case)
    try:
        return mutant is not None and all(
            _equal(value, given) for _, value, given in _pairs(answer.case, mutant, answer.value)
        )
    except Fault:
        return False


def _equal(value: Any, given: Any) -> bool:
    """Equal up to the rounding of float64, or of float32 where the student computes in that; NaN equals NaN."""
    if isinstance(value, str) or isinstance(given, str):
        return isinstance(value, str) and isinstance(given, str) and value == given
    value, given = np.asarray(value), np.asarray(given)
    if value.shape != given.shape or given.dtype.kind not in "fiub":
        return False
    relative = 1e-5 if given.dtype in (np.float32, np.float16) else FLOAT64.relative
    largest = np.abs(value[np.isfinite(value)]).max(initial=0.0) if value.dtype.kind == "f" else 0.0
    atol = relative * largest + ROUNDING
    return bool(np.allclose(value, given, rtol=0.0, atol=atol, equal_nan=True))


def _sentence(found: list[Explanation], known: list[Misreading]) -> str:
    new = [part for part in found[0] if part not in known]
    before = " and ".join(part.gives for part in found[0] if part in known)
    if not new:
        return f"As before, this is what one gets {before}."
    gives, instead = " and ".join(part.gives for part in new), ". Also, ".join(part.instead for part in new)
    others = "".join(f" (Or {' and '.join(part.gives for part in each)}: {each[0].instead}.)" for each in found[1:2])
    anchors = dict.fromkeys(next(step.anchor for step in STEPS if step.name == part.step) for part in new)
    pages = ", ".join(f"definitions.md#{anchor}" for anchor in anchors)
    repeated = f" As before, also {before}." if before else ""
    return f"This is what one gets {gives}; {instead}.{others}{repeated} See {pages}."


# Hints, where no misreading is known


def _hints(student: Student, answer: Answer, off: Off, *, is_first: bool) -> list[str]:
    """Where an earlier step is off, only what is seen at once: the rest would be said again and again."""
    hints = _simple_relation(off)
    return [*(hints or _small_error(answer)), *_central_differences(student, answer)] if is_first else hints


def _small_error(answer: Answer) -> list[str]:
    options = answer.case.options
    if options.get("training") and options.get("dropout_keep") is not None and answer.error < 1e-3:
        return [
            "Batch norm takes a wrong factor of its input away again, but for ε: does dropout multiply what it keeps by "
            "1 / (1 - DROPOUT_RATE)?"
        ]
    has_norm = "training" in options or "momentum" in options  # then ε, too, makes small errors
    if answer.error < 1e-6 and not has_norm:
        return ["So small an error may be the rounding of float32: is something computed in it? Maps are float64."]
    return []


def _simple_relation(off: Off) -> list[str]:
    """Float32, a factor, another order along an axis. A single number always has a factor, so there it says nothing."""
    value, expected = off.value, np.asarray(off.expected)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return []
    if value.dtype in (np.float32, np.float16):
        return [f"It is {value.dtype}: maps are float64."]
    largest = np.abs(expected).max(initial=0.0)
    if largest == 0.0:
        return []
    if np.abs(value - expected).max() < 1e-6 * largest and np.array_equal(value, value.astype(np.float32)):
        return ["All values are numbers of float32: is something computed in it? Maps are float64."]
    at = np.unravel_index(np.abs(expected).argmax(), expected.shape)
    factor = float(value[at]) / float(expected[at])
    if value.size > 1 and value.any() and _equal(factor * expected, value) and f"{factor:.6g}" != "1":
        return [f"Every value is {factor:.6g} times what is expected."]
    if not value.any():
        return ["All values are 0."]
    flips = {"images": 0, "channels": 1, "rows": 2, "columns": 3} if value.ndim == 4 else {}
    for name, axis in flips.items():
        if value.shape[axis] > 1 and _equal(np.flip(expected, axis), value):
            return [f"It is right but for the order of the {name}, which is reversed."]
    return []


def _central_differences(student: Student, answer: Answer) -> list[str]:
    """Whether a gradient is the one of the student's own forward function."""
    case = answer.case
    forward = case.function.removesuffix("_backward")
    if forward == case.function or forward == "bilinear_resize" or answer.value is None:
        return []
    has_grad_output = forward != "upsampled_cross_entropy"
    grad_output = case.arguments[0] if has_grad_output else 1.0
    arguments = case.arguments[1:] if has_grad_output else case.arguments
    results = answer.value if case.returns else (answer.value,)
    positions = [i for i, argument in enumerate(arguments) if _is_differentiated(argument)][: len(results)]
    rng = np.random.default_rng(0)
    try:
        for i, gradient in zip(positions, results, strict=False):
            direction = [rng.standard_normal(leaf.shape) * without_running(where) for where, leaf in leaves(arguments[i])]
            values = [
                np.sum(grad_output * student.call(forward, _moved(arguments, i, direction, sign), case.options)[0])
                for sign in (DIFFERENCES_STEP, -DIFFERENCES_STEP)
            ]
            numeric = float(values[0] - values[1]) / (2 * DIFFERENCES_STEP)
            pairs = zip(leaves(gradient), direction, strict=True)
            analytic = float(sum(np.sum(leaf * v) for (_, leaf), v in pairs if v.any()))
            if not abs(numeric - analytic) <= DIFFERENCES_BOUND * max(abs(numeric), abs(analytic)):
                name = case.returns[i] if case.returns else "the result"
                return [
                    f"Central differences of your own {forward} do not agree with {name}: along a random direction they "
                    f"give {numeric:.6g}, your gradient {analytic:.6g}."
                ]
    except Exception:  # the forward function fails, or the gradient has another structure
        return []
    return [f"It is the gradient of your own {forward}, as central differences say: so look at {forward} first."]


def _left_out(student: Student, step: Step) -> list[str]:
    """Said where the student's cell does not concatenate as many branches as it has."""
    case = next(case for case in step.cases() if case.function == "dense_prediction_cell")
    counts: list[int] = []
    concat_project = getattr(student.module, "concat_project", None)
    if concat_project is None:
        return []

    def counting(branches: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(len(branches))
        return concat_project(branches, *arguments, **options)

    student.module.concat_project = counting
    try:
        student.call(case.function, case.arguments, case.options)
    except (Fault, NotWrittenError):
        pass
    finally:
        student.module.concat_project = concat_project
    branches = len(case.arguments[1].branches)
    if not counts or counts[0] == branches:
        return []
    return [
        f"Your cell gives concat_project {counts[0]} of its {branches} branches: all are concatenated, also those that others "
        "read. See definitions.md#concatenate-and-project."
    ]


def _is_differentiated(argument: Any) -> bool:
    arrays = [leaf for _, leaf in leaves(argument)]
    return bool(arrays) and all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in arrays)


def _moved(arguments: tuple[Any, ...], position: int, direction: list[Any], step: float) -> tuple[Any, ...]:
    remaining = iter(direction)

    def moved(tree: Any) -> Any:
        if isinstance(tree, np.ndarray):
            return tree + step * next(remaining)
        children = [moved(child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)

    return tuple(moved(each) if i == position else each for i, each in enumerate(arguments))


def _called(case: Case) -> str:
    return f"{case.function} ({case.says})"
