"""The language of the code: how docstrings open, names that say nothing, codes that only insiders know, and names of tests."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rlhf_jax", "experiments", "scripts", "tests")
VERBS = frozenset(
    """
    accumulate adapt add adjust advance aggregate align allocate allow annotate answer append apply arrange ask
    assemble assert assign attach attend average award back balance begin benchmark bind block bound bracket
    broadcast bucket build bundle cache calculate call cancel cap capture cast center centre change charge check
    choose claim clean clear clip clone close collapse collect combine commit compare compile complete compose
    compress compute concatenate configure confirm connect construct consume continue convert copy correct
    correlate count cover create cut deal decide declare decode decompose decrypt deduplicate default define
    delegate delete dequantize derive describe deserialize detach detect determine differentiate discard
    discover dispatch display divide do document double download draft drain draw drive drop dump edit embed
    emit enable encode end enforce ensure enter enumerate erase escape estimate evaluate examine exchange
    exclude execute exit expand expect explain export expose extend extract fail fall fetch fill filter finalize
    find finish fit fix flag flatten flip flush fold follow forget fork format forward free freeze gather
    generate get give grant group grow guard guess hand handle hash hide hold identify ignore implement import
    include increase increment infer inform initialize inject insert inspect install instantiate interleave
    interpolate interpret intersect invert invoke iterate join judge jump keep kill label launch leave lift
    limit link list listen load locate lock log look lower make map mark mask match materialize mean-pool
    measure merge migrate mirror mix mock move multiply name negate normalise normalize note number observe
    obtain offer offload open optimise optimize order override overwrite pack pad parse partition pass patch pay
    perform permute pick place plan play plot point poll pool populate post predict prefill prepare prepend
    preserve pretend prevent print probe process produce profile project propagate prove provide prune publish
    pull push put quantise quantize query quote raise randomize rank rate reach read rebuild recall receive
    recompute reconstruct record recover reduce refresh refuse register reject relate release reload remap
    remove rename render reorder repeat replace replay report represent request require rerun rescale reserve
    reset reshape reshard resize resolve restart restore restrict resume retrieve retry return reuse reverse
    revert rewind rewrite roll rotate round route run sample save scale scan scatter schedule score search seed
    select send separate serialize serve set settle shape shard share shift shorten show shrink shuffle sign
    simulate skip sleep slice solve sort split spread stack standardize start state step stop store stream strip
    subtract suggest sum summarise summarize supervise suppress swap switch synchronize take tell terminate test
    tie time tokenise tokenize touch trace track train transfer transform translate transpose traverse treat
    trim truncate try turn unfold unlink unpack update upload use validate vary verify visit wait walk warn
    watch weigh whiten widen work wrap write yield zero
    """.split()
)
"""Words that the docstring of a function may begin with: a verb in the imperative. Add a verb that is missing."""
PRIVATE_NAMES = frozenset(
    """
    anybody anything asked asleep awake begun born both done drawn each elsewhere everything found given gone
    got heard held here home it kept known left made meant mine missed named nothing now others ours placed rest
    said seen shown somebody something somewhere sought stood taken that theirs them there these they this those
    told tried used wanted went what who whom whose written
    """.split()
)
"""Participles and pronouns that no variable, argument, function or attribute may be called: name what the value is."""
CODES = re.compile(r"\b(?:[Pp]oint|[Cc]ase|[Ll]esson) \d+\b|\bSPEC\b|\bRELIABILITY\b|\b(?<![\w.])B[1-9]\d?\b(?![\w.%])")
"""Codes whose meaning stands outside the repository."""
QUOTED = re.compile(r"``[^`]*``|`[^`]*`|'[^']*'|\"[^\"]*\"")
LONGEST_TEST_NAME = 60
INSIDER = f"B{13}"
"""A code of the kind that `CODES` finds."""


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def opening_problem(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) -> str | None:
    """Say what is wrong with the first line of a docstring; None when nothing is."""
    text = ast.get_docstring(node)
    if text is None:
        return None
    word = text.split()[0] if text.split() else ""
    plain = word.rstrip(",.:;").lower()
    if isinstance(node, ast.Module | ast.ClassDef):
        return f"begins with {word!r}" if plain in {"of", "as", "what", "how", "where", "which", "whether"} else None
    if plain not in VERBS or word.endswith(":") or not word[0].isupper():
        return f"begins with {word!r}, not with a verb"
    return None


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("property" in text or text.endswith("fixture") or "fixture(" in text for text in decorators)


def docstring_problems(tree: ast.Module, of_tests: bool) -> Iterator[str]:
    """Yield what is wrong with docstrings; those of functions in tests are free."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if of_tests:
                continue
            if is_property(node):
                if (ast.get_docstring(node) or "").split(" ")[0] in ("Of", "As", "What"):
                    yield f"{node.lineno}: docstring of {node.name} is a riddle"
                continue
        elif not isinstance(node, ast.ClassDef | ast.Module):
            continue
        if problem := opening_problem(node):
            yield f"{getattr(node, 'lineno', 1)}: docstring of {getattr(node, 'name', 'the module')} {problem}"


def defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that the module names: variables, arguments, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def name_problems(tree: ast.Module) -> Iterator[str]:
    for line, name in defined_names(tree):
        if name.strip("_").lower() in PRIVATE_NAMES:
            yield f"{line}: the name {name!r} does not say what it is"
        elif name.startswith("test_") and len(name) > LONGEST_TEST_NAME:
            yield f"{line}: {name} is longer than {LONGEST_TEST_NAME} characters"


def code_problems(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        comment = line.partition("#")[2] if line.count('"') % 2 == 0 else line
        if match := CODES.search(QUOTED.sub("", comment if "#" in line else "")):
            yield f"{number}: {match[0]!r} means nothing to a reader of this repository"


def problems(path: Path) -> list[str]:
    text = path.read_text()
    tree = ast.parse(text)
    in_docstrings = [
        f"{getattr(node, 'lineno', 1)}: {match[0]!r} means nothing to a reader of this repository"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if (match := CODES.search(QUOTED.sub("", ast.get_docstring(node) or "")))
    ]
    return [
        *docstring_problems(tree, "tests" in path.parts),
        *name_problems(tree),
        *code_problems(text),
        *in_docstrings,
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_language_of(folder: str) -> None:
    listed = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in problems(path)
    ]
    assert listed == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('def f():\n    """Of a run."""', "docstring of f begins with 'Of'"),
        ('def f():\n    """The state."""', "begins with 'The'"),
        ('def f():\n    """Raises InputError."""', "begins with 'Raises'"),
        ('def f():\n    """``text`` as tokens."""', "begins with '``text``'"),
        ('class C:\n    """What a run needs."""', "docstring of C begins with 'What'"),
        ("found = 1", "the name 'found'"),
        ("def f(told): pass", "the name 'told'"),
        (f"def test_{'x' * 60}(): pass", "is longer than 60"),
        (f"x = 1  # see {INSIDER}", repr(INSIDER)),
        ('"""As point 3 says."""', "begins with 'As'"),
    ],
)
def test_problems_are_seen(tmp_path: Path, code: str, words: str) -> None:
    (tmp_path / "module.py").write_text(code)
    assert any(words in problem for problem in problems(tmp_path / "module.py"))


def test_good_language_has_no_problem(tmp_path: Path) -> None:
    code = 'def f(state):\n    """Return the parameters of ``state``. Raises InputError when there are none."""\n    return 1\n'
    (tmp_path / "module.py").write_text(f'"""Losses of preference pairs."""\n\n{code}')
    assert problems(tmp_path / "module.py") == []


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for place in sorted(Path(argument).rglob("*.py")) if Path(argument).is_dir() else [Path(argument)]:
            print(*(f"{place}:{problem}" for problem in problems(place)), sep="\n", end="\n" if problems(place) else "")
