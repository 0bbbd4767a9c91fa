"""``python -m convert --source X``: the family is read from the config, or given as a file with ``--family``."""

from __future__ import annotations

import argparse
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
    parser = parser_of("python -m convert", "a family that its config or a file of your own names",
                       "--source is needed, or --rules with --family.", (
        "python -m convert --source DIRECTORY --output out/mine",
        "python -m convert --family examples/my_gpt.py --source my.pt --output out/my",
        "python -m convert --family examples/my_gpt.py --rules"))
    parser.add_argument("--family", metavar="FILE",
                        help="a family file of your own, as examples/my_gpt.py; its code is run")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(_family_of(options), options))


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
    if stem in families():
        return importlib.import_module(f"convert.{stem}").FAMILY
    raise BadInput(f"there is no family {name!r}; there are {', '.join(families())}. Write one as a file, as "
                   "examples/my_gpt.py is, or have one drafted (python -m convert.draft --help), and give it with "
                   "--family FILE.")


def _family_of(options: argparse.Namespace) -> Family:
    source = options.source
    if source is None and not (options.rules and options.family):
        raise BadInput("whose rules? Give --family FILE or --source, or name a family: python -m convert.gptj --rules"
                       if options.rules else
                       "give --source, or run the demo of a built-in family: python -m convert.gptj")
    if options.family is not None:
        return load_family(Path(options.family))
    from .checkpoint import read_config
    from .hub import resolve
    path = resolve(source, options.revision)[0]
    if not ((path if path.is_dir() else path.parent) / "config.json").is_file():
        return _known_by_its_header(path, source)
    kind = read_config(path).get("model_type")
    if kind is None:
        raise BadInput(f"the config.json of {source} names no model_type, so its family cannot be told. Name it, as "
                       f"python -m convert.gptj --source {source}, or give --family FILE. There are: "
                       f"{', '.join(families())}.")
    return family_named(kind)


def _known_by_its_header(path: Path, source: str) -> Family:
    """The one family that can tell from the tensors of a checkpoint what its config would say."""
    from .checkpoint import opened
    found = []
    with opened(path) as checkpoint:
        names = list(checkpoint.tensors)
        for family in map(family_named, families()):
            with suppress(BadInput):
                found += [family] if family.config_of and family.config_of(checkpoint.tensors) else []
    if len(found) != 1:
        raise BadInput(f"there is no config.json beside {source}, and without one its tensors ({', '.join(names[:3])}"
                       ", …) are of no family that is known. Put it there; or, for a net of your own, write a family "
                       "file, as examples/my_gpt.py is, or have one drafted (python -m convert.draft --help), and "
                       f"python -m convert --family FILE --source {source}")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
