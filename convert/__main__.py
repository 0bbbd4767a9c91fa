"""``python -m convert --source X``: the family is read from the config, or given as a file with ``--family``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .cli import parser_of, run
from .errors import BadInput, guarded
from .rules import Family


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of a conversion whose family is found rather than named."""
    parser = parser_of("python -m convert", "a family that its config names", "--source is needed.")
    parser.add_argument("--family", metavar="FILE", help="a family file of your own; its code is run")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(_family_of(options.family, options.source, options.revision), options))


def load_family(file: Path) -> Family:
    """The ``FAMILY`` of a Python file that the user named; its code is run, which is why it must be named."""
    if not file.is_file():
        raise BadInput(f"--family {file} does not exist.")
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None:
        raise BadInput(f"--family {file} is not a Python file.")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"--family {file} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not isinstance(getattr(module, "FAMILY", None), Family):
        raise BadInput(f"{file} defines no FAMILY = Family(...). See convert/gptj.py for one.")
    return module.FAMILY


def families() -> list[str]:
    """The families that have a file here, in the order of the alphabet."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if "\nFAMILY = Family(" in file.read_text("utf-8"))


def family_named(name: object) -> Family:
    """The family that ``convert/<name>.py`` describes, a dash being an underscore there; :class:`BadInput` when there
    is none.
    """
    stem = str(name).replace("-", "_")
    if stem.isidentifier():
        file = Path(__file__).with_name(f"{stem}.py")
        module = importlib.import_module(f"convert.{stem}") if file.is_file() else None
        if isinstance(getattr(module, "FAMILY", None), Family):
            return module.FAMILY
    raise BadInput(f"there is no family {name!r}. Write one as a file and give it with --family FILE.")


def _family_of(file: str | None, source: str | None, revision: str | None) -> Family:
    if source is None:
        raise BadInput("give --source, or run the demo of a built-in family: python -m convert.gptj")
    if file is not None:
        return load_family(Path(file))
    from .checkpoint import read_config
    from .hub import resolve
    path = resolve(source, revision)[0]
    if not ((path if path.is_dir() else path.parent) / "config.json").is_file():
        known = _known_by_its_header(path)
        if known is not None:
            return known
    return family_named(read_config(path).get("model_type"))


def _known_by_its_header(path: Path) -> Family | None:
    """The one family that can tell from the tensors of a checkpoint what its config would say."""
    from .checkpoint import opened
    found = []
    with opened(path) as checkpoint:
        for family in map(family_named, families()):
            with suppress(BadInput):
                found += [family] if family.config_of and family.config_of(checkpoint.tensors) else []
    return found[0] if len(found) == 1 else None


if __name__ == "__main__":
    sys.exit(main())
