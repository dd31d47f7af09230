"""The house of design: who may import whom, no circles, small rooms, no private names."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("stateful_gpt", "experiments", "analysis", "scripts", "hydra_plugins")
# which of our packages each may import, besides itself
ALLOWED = {
    "stateful_gpt": set(),
    "experiments": {"stateful_gpt"},
    "analysis": set(),
    "scripts": {"stateful_gpt", "experiments", "analysis"},
    "hydra_plugins": {"experiments"},
}
NEVER = {
    "stateful_gpt": {"hydra", "omegaconf", "wandb", "pandas", "matplotlib"},
    "experiments": {"matplotlib", "seaborn"},
    "analysis": {"torch"},
}
IN_ONE_FILE = {"transformers"}  # of the library, imported where it is used
FOREIGN = ("hydra", "wandb", "torch")
LARGEST = 350  # lines


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(
    path: Path, *, lazily: bool = True, as_command: bool = True
) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports, with lines; ``from a import b`` gives ``a.b``."""
    todo: list[ast.AST] = [tree(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        if not as_command and isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        if not lazily and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if lazily or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)


def violations(found: Iterator[str]) -> None:
    listed = sorted(found)
    assert not listed, "\n".join(listed)


def test_lower_packages_never_import_higher_ones() -> None:
    def look() -> Iterator[str]:
        for path in modules().values():
            package = path.relative_to(ROOT).parts[0]
            for name, line in imported(path):
                top = name.partition(".")[0]
                other = top in PACKAGES and top not in {package, *ALLOWED[package]}
                if other or top in NEVER.get(package, set()):
                    yield f"{path.relative_to(ROOT)}:{line} imports {name}"

    violations(look())


def test_transformers_is_imported_by_its_own_files_where_it_is_used() -> None:
    places = {
        path.relative_to(ROOT)
        for path in modules().values()
        if path.is_relative_to(ROOT / "stateful_gpt")
        for name, _ in imported(path)
        if name.partition(".")[0] in IN_ONE_FILE
    }
    assert {place.stem.startswith("hugging_face") for place in places} <= {True}, places
    for place in places:
        eager = {name.partition(".")[0] for name, _ in imported(ROOT / place, lazily=False)}
        assert not eager & IN_ONE_FILE, f"{place} imports it before it is needed"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports in functions count, too: they only hide a circle."""
    graph: dict[str, set[str]] = {}
    for module, path in modules().items():
        graph[module] = {
            target
            for name, _ in imported(path, as_command=False)  # nobody imports a command
            for target in (name, name.rpartition(".")[0])
            if target in modules() and target != module and modules()[target].stat().st_size
        }

    def circles(module: str, way: tuple[str, ...], done: set[str]) -> Iterator[str]:
        if module in way:
            yield " -> ".join((*way[way.index(module) :], module))
        elif module not in done:
            done.add(module)
            for target in sorted(graph[module]):
                yield from circles(target, (*way, module), done)

    done: set[str] = set()
    violations(circle for module in sorted(graph) for circle in circles(module, (), done))


def test_an_init_of_a_folder_of_rooms_imports_nothing() -> None:
    violations(
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules().values()
        if path.name == "__init__.py"
        for name, line in imported(path, lazily=False)
        if name.partition(".")[0] in PACKAGES  # what is imported where it is asked for may stay
    )


def test_no_file_is_longer_than_a_person_reads() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()
    }
    violations(
        f"{path.relative_to(ROOT)} has {length} lines, more than {LARGEST}"
        for path, length in lengths.items()
        if length > LARGEST
    )


def test_no_private_name_of_a_dependency_is_used() -> None:
    """In imports, and in attributes of what was imported or of a W&B run."""

    def look() -> Iterator[str]:
        for path in modules().values():
            place, foreign = path.relative_to(ROOT), {"run"}
            for name, line in imported(path):
                parts = name.split(".")
                if parts[0] in FOREIGN:
                    foreign |= {parts[0], parts[-1]}
                    if any(is_private(part) for part in parts):
                        yield f"{place}:{line} imports {name}"
            for node in ast.walk(tree(path)):
                private = isinstance(node, ast.Attribute) and is_private(node.attr)
                if private and root(node) in foreign:
                    yield f"{place}:{node.lineno} uses {ast.unparse(node)}"

    violations(look())


def root(node: ast.AST) -> str | None:
    """The name that a chain of attributes and calls without arguments begins with."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            node = node.value
        elif isinstance(node, ast.Call) and not node.args:
            node = node.func
        else:
            return None
    return node.id


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))
