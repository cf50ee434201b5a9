"""The repository keeps to its own rules: imports, sizes, and WORKSPACE.md."""

import ast
import functools
import pathlib
import re

from pallas_kernels import shapes

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("README.md", "WORKSPACE.md", "Makefile", "pyproject.toml"),
    *("requirements.txt", "requirements-gpu.txt", "requirements-tpu.txt"),
    "requirements-triton.txt",
    *("bsa", "pallas_kernels", "configs", "experiments", "tests", "colab"),
}
PRODUCT = ("bsa", "pallas_kernels", "configs")
# A package may import those of a smaller number, and itself.
LEVELS = {
    "pallas_kernels": 0,
    "bsa.index": 1,
    "bsa.parallel": 2,
    "bsa.model": 3,
    "bsa.tasks": 4,
    "bsa.decode": 4,
    "bsa.pretrained": 4,
    "bsa.train": 5,
    "bsa.main": 6,
}
# A library, and the only places of the product that may import it.
HOMES = {
    "flax": ("bsa/model/",),
    "optax": ("bsa/train/", "bsa/tasks/"),
    "orbax": ("bsa/train/", "bsa/tasks/"),
    "grain": ("bsa/train/", "bsa/tasks/"),
    "tensorflow_datasets": ("bsa/train/", "bsa/tasks/"),
    "ml_collections": ("configs/", "bsa/main.py", "bsa/train/settings.py"),
    "jax_triton": ("pallas_kernels/",),
    "safetensors": ("bsa/pretrained/",),
    "gguf": ("bsa/pretrained/",),
    "tokenizers": ("bsa/pretrained/",),
}
JIT_HOMES = ("bsa/train/step.py", "bsa/decode/")


def files(*folders):
    """Python files below the folders, as paths relative to the repository."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


@functools.cache
def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def nodes(file, kind):
    return [node for node in ast.walk(parse(file)) if isinstance(node, kind)]


def imports(file):
    """(module, name or None, line) of each import in a file, wherever it stands."""
    found = []
    for node in nodes(file, ast.Import | ast.ImportFrom):
        for alias in node.names:
            if isinstance(node, ast.Import):
                found.append((alias.name, None, node.lineno))
            else:
                module = "." * node.level + (node.module or "")
                found.append((module, alias.name, node.lineno))
    return found


def is_module(dotted):
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def full_name(module, name):
    """The module that an import of `name` from `module` makes use of."""
    dotted = f"{module}.{name}"
    return dotted if name and is_module(dotted) else module


def package(dotted):
    """The part of a dotted name that has a level, or None."""
    parts = dotted.split(".")
    name = ".".join(parts[: 2 if parts[0] == "bsa" else 1])
    return name if name in LEVELS else None


def test_top_level():
    ignored = re.compile(r"\..*|.*\.egg-info|runs|__pycache__")
    found = {path.name for path in ROOT.iterdir() if not ignored.fullmatch(path.name)}
    assert found == TOP_LEVEL
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, ".ci/run can be executed"


def test_every_module_has_a_level():
    homeless = [
        file
        for file in files("bsa", "pallas_kernels")
        if file != "bsa/__init__.py"
        and package(file.removesuffix(".py").replace("/", ".")) is None
    ]
    assert not homeless


def test_imports_never_point_up():
    wrong = []
    for file in files("bsa", "pallas_kernels"):
        own = package(file.removesuffix(".py").replace("/", "."))
        for module, name, line in imports(file):
            other = package(full_name(module, name))
            if other and other != own and LEVELS[other] >= LEVELS.get(own, 0):
                wrong.append(f"{file}:{line} imports {other}")
            if module.startswith("."):
                wrong.append(f"{file}:{line} imports relatively")
    assert not wrong


def test_configs_import_only_ml_collections_and_base():
    allowed = {("ml_collections", None), ("configs", "base")}
    wrong = [
        f"{file}:{line} imports {module}"
        for file in files("configs")
        for module, name, line in imports(file)
        if (module, name) not in allowed
    ]
    assert not wrong


def test_nothing_imports_experiments_notebooks_tests_or_configs():
    """The one reader of configs is the flag of `bsa.main`, which loads them by path."""
    wrong = [
        f"{file}:{line} imports {module}"
        for file in files(*PRODUCT)
        for module, name, line in imports(file)
        if module.split(".")[0] in {"experiments", "colab", "tests"}
        or (module.split(".")[0] == "configs" and not file.startswith("configs/"))
    ]
    assert not wrong


def test_libraries_stay_in_their_homes():
    wrong = [
        f"{file}:{line} imports {module}"
        for file in files(*PRODUCT)
        for module, _, line in imports(file)
        if not file.startswith(HOMES.get(module.split(".")[0], ""))
    ]
    assert not wrong


def test_jax_triton_is_imported_where_it_is_needed():
    """By one file, inside a function: it weighs a gigabyte that most machines lack."""
    users = {
        file
        for file in files(*PRODUCT)
        if any(module.split(".")[0] == "jax_triton" for module, _, _ in imports(file))
    }
    assert len(users) <= 1
    for file in users:
        at_import = [
            alias.name
            for node in parse(file).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert "jax_triton" not in at_import


def test_modules_are_imported_not_names():
    """But for the `__init__.py` that gives `pallas_kernels` its public names."""
    wrong = [
        f"{file}:{line} imports {name} from {module}"
        for file in files("bsa", "pallas_kernels", "configs")
        for module, name, line in imports(file)
        if not file.endswith("__init__.py")
        and module.split(".")[0] in PRODUCT
        and name
        and not is_module(f"{module}.{name}")
    ]
    assert not wrong


def test_private_names_stay_in_their_files():
    wrong = []
    for file in files(*PRODUCT, "experiments", "tests"):
        ours = set()
        for node in nodes(file, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", None) or alias.name
                if module.split(".")[0] in PRODUCT:
                    ours.add(alias.asname or alias.name)
                    if alias.name.startswith("_"):
                        wrong.append(f"{file}:{node.lineno} imports {alias.name}")
        for node in nodes(file, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and isinstance(node.value, ast.Name) and node.value.id in ours:
                wrong.append(f"{file}:{node.lineno} uses {node.value.id}.{node.attr}")
    assert not wrong


def test_jit_stays_in_its_homes():
    wrong = [
        f"{file}:{node.lineno}"
        for file in files("bsa", "pallas_kernels")
        if not file.startswith(JIT_HOMES)
        for node in nodes(file, ast.Attribute)
        if node.attr in {"jit", "pjit"} and ast.unparse(node.value) == "jax"
    ]
    wrong += [
        f"{file}:{line}"
        for file in files("bsa", "pallas_kernels")
        for module, name, line in imports(file)
        if module.startswith("jax") and name in {"jit", "pjit"}
    ]
    assert not wrong


def test_files_and_functions_are_short():
    """But for the one list of all knobs, which would not gain from being cut."""
    wrong = []
    for file in files(*PRODUCT, "experiments", "tests"):
        num_lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        if num_lines > (400 if file.startswith("pallas_kernels/") else 300):
            wrong.append(f"{file}: {num_lines} lines")
        for node in nodes(file, ast.FunctionDef):
            is_kernel = any(arg.arg.endswith("_ref") for arg in node.args.args)
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > (120 if is_kernel else 80) and file != "configs/base.py":
                wrong.append(f"{file}:{node.lineno} {node.name}: {num_lines} lines")
    assert not wrong


def test_nothing_is_printed():
    wrong = [
        f"{file}:{node.lineno}"
        for file in files(*PRODUCT)
        for node in nodes(file, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def workspace_tree():
    """Files that stand first on a line of a fenced block of WORKSPACE.md."""
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    path = re.compile(
        r"^[\s\d.)│├└─]*((?:bsa|pallas_kernels|configs|experiments|colab)/\S+"
        r"\.(?:py|ipynb))(?=\s|$)",
        re.MULTILINE,
    )
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [found for block in blocks for found in path.findall(block)]


def has_code(file):
    """False for an `__init__.py` that holds a docstring at most."""
    return any(not isinstance(node, ast.Expr) for node in parse(file).body)


def test_workspace_tree_is_the_tree():
    """Each file once; an `__init__.py` without code need not be there."""
    listed = workspace_tree()
    assert len(listed) == len(set(listed)), "a file is listed twice"
    notebooks = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "colab").glob("*.ipynb")
    ]
    found = {file for file in files(*PRODUCT, "experiments") if has_code(file)}
    assert set(listed) == found | set(notebooks)


def test_workspace_alphabet_is_the_alphabet():
    """A table below a heading with that word; its cells are `B batch`, or `B` | `batch`."""
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    section = re.search(
        r"^#+ [^\n]*alphabet.*?(?=^#|\Z)",
        text,
        re.MULTILINE | re.DOTALL | re.IGNORECASE,
    )
    rows = re.findall(r"^\s*\|(.*)\|\s*$", section[0], re.MULTILINE)
    cells = " | ".join(rows).replace("`", "")
    pairs = re.findall(r"(?:^|\|)\s*([A-Z])(?:\s*\||\s)\s*([^|]+?)\s*(?=\||$)", cells)
    assert dict(pairs) == shapes.ALPHABET
    assert len(pairs) == len(shapes.ALPHABET), "a letter is listed twice"
