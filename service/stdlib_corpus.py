"""The demo's corpus: what the running interpreter's standard library documents about itself.

Run as a script (``python -I stdlib_corpus.py``), it prints a BEIR corpus. Importing every module of the library has
side effects, so it happens in a process of its own, and this file imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MAX_TEXT_CHARACTERS = 600
MAX_PARAGRAPHS = 3
SENTENCE = re.compile(r"(?<=[.:;])\s")
MAX_SUMMARY_CHARACTERS = 100  # of a method, in its class's text
MIN_DOC_CHARACTERS = 12  # shorter ones ("Alias.", "") tell a reader nothing

# open windows or browsers, print, are tests or tools without an API, or are deprecated shims that only warn
_SKIPPED_NAMES = """
antigravity this idlelib tkinter turtle turtledemo test lib2to3 pydoc_data ensurepip distutils sre_compile sre_constants
sre_parse asynchat asyncore smtpd imp msilib nturl2path nt ntpath posixpath genericpath posix pyexpat winreg winsound
msvcrt opcode crypt rlcompleter
"""
SKIPPED = frozenset(_SKIPPED_NAMES.split())
WITHOUT_CHILDREN = frozenset({"encodings"})  # a hundred codecs that say the same
SAYS_NOTHING = ("An enumeration.", "Initialize self.", "Deprecated AST node class")
SKIPPED_LEAVES = frozenset({"__main__", "test", "tests", "idle_test", "windows_events", "windows_utils"})
BESIDES = ("os.path",)  # public modules that no package walk finds

Entry = tuple[str, Any, str]  # qualified name, object, kind


def collect_documents() -> list[dict[str, Any]]:
    """Return the corpus as BEIR records, in the order of their ids (``collections.Counter``), each object once.

    Builtins go without their module's name (``len``, ``str.split``), as people write them.
    """
    chosen: dict[int, Entry] = {}
    for module in _import_modules():
        for name, value, kind in _public_entries(module):
            identity = id(getattr(value, "__func__", value))  # random.shuffle is a bound Random.shuffle
            kept = chosen.get(identity)
            if kept is None or _rank(name) < _rank(kept[0]):
                chosen[identity] = (name, value, kind)
    by_name: dict[str, Entry] = {}
    for name, value, kind in chosen.values():
        if kind != "module" or name not in by_name:  # unittest.main is a module, and the class that hides it
            by_name[name] = (name, value, kind)
    documents = [_document(*by_name[name]) for name in sorted(by_name)]
    return [document for document in documents if document is not None]


def _rank(name: str) -> tuple[int, int, str]:
    """Of several names for one object, the one with the fewest parts, then the shortest."""
    return name.count("."), len(name), name


def _import_modules() -> Iterator[ModuleType]:
    """Yield every public module of the library that imports on this platform."""
    for top in sorted(sys.stdlib_module_names):
        if not top.startswith("_") and top not in SKIPPED:
            yield from _import_with_children(top)
    for name in BESIDES:
        yield importlib.import_module(name)


def _import_with_children(name: str) -> Iterator[ModuleType]:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):  # absent on this platform, or built without its library
        return
    yield module
    if name in WITHOUT_CHILDREN:
        return
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not child.name.startswith("_") and child.name not in SKIPPED_LEAVES:
            yield from _import_with_children(f"{name}.{child.name}")


def _public_entries(module: ModuleType) -> Iterator[Entry]:
    """Yield the module, its functions and classes, and the classes' own methods."""
    prefix = "" if module.__name__ == "builtins" else _public_name(module) + "."
    yield prefix.rstrip(".") or "builtins", module, "module"
    for name in _public_names(module):
        value = getattr(module, name, None)
        if inspect.isclass(value):
            yield prefix + name, value, "class"
            for method_name, method in _own_methods(value):
                yield f"{prefix}{name}.{method_name}", method, "method"
        elif inspect.isroutine(value):
            yield prefix + name, value, "function"


def _public_name(module: ModuleType) -> str:
    return "os.path" if module is os.path else module.__name__


def _public_names(module: ModuleType) -> list[str]:
    """``__all__`` where it is given, else what the module itself defines, as pydoc does."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, value in vars(module).items() if _is_defined_in(value, module)]
    return sorted(name for name in set(names) if not name.startswith("_"))


def _is_defined_in(value: object, module: ModuleType) -> bool:
    home = getattr(value, "__module__", None)
    return home in (module.__name__, "_" + module.__name__) or (home is None and inspect.isbuiltin(value))


def _own_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods that the class defines itself and documents otherwise than its bases do."""
    for name, value in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        method = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if inspect.isroutine(method) and not _is_inherited_doc(cls, name, method):
            yield name, method


def _is_inherited_doc(cls: type, name: str, method: object) -> bool:
    doc = getattr(method, "__doc__", None)
    bases = cls.__mro__[1:]
    return any(doc == getattr(vars(base).get(name), "__doc__", None) for base in bases if name in vars(base))


def _document(name: str, value: object, kind: str) -> dict[str, Any] | None:
    doc = _own_doc(value, kind)
    text = _first_paragraphs(doc, name)
    if kind == "class":
        text = _with_methods(text, value)
    if len(text) < MIN_DOC_CHARACTERS or text.startswith(SAYS_NOTHING):
        return None
    title = name + _signature(value) if kind in ("function", "method") else name
    if kind == "class" and "." in name:
        title = f"{name.rsplit('.', 1)[1]} ({name})"
    return {"_id": name, "title": title, "text": text, "metadata": {"kind": kind, "module": _module_of(name, kind)}}


def _with_methods(text: str, cls: object) -> str:
    """The first two sentences of a class, then what its own methods do, then the rest, as far as there is room.

    Methods often say more of what a class is for than its docstring does.
    """
    sentences = SENTENCE.split(text)
    summaries = []
    for name, method in _own_methods(cls):  # type: ignore[arg-type]  # kind "class" holds classes
        first = SENTENCE.split(_first_paragraphs(_own_doc(method, "method"), name), maxsplit=1)[0]
        if len(first) >= MIN_DOC_CHARACTERS:
            summaries.append(f"{name}: {textwrap.shorten(first, MAX_SUMMARY_CHARACTERS, placeholder=' …')}")
    parts = [*sentences[:2], *summaries, *sentences[2:]]
    return textwrap.shorten(" ".join(parts), MAX_TEXT_CHARACTERS, placeholder=" …")


def _own_doc(value: object, kind: str) -> str:
    """The object's own docstring, else its constructor's; never its base's, nor the field list of a dataclass."""
    if kind != "class":
        doc = getattr(value, "__doc__", None)
        return inspect.cleandoc(doc) if isinstance(doc, str) else ""
    for doc in (vars(value).get("__doc__"), getattr(vars(value).get("__init__"), "__doc__", None)):
        if isinstance(doc, str) and not re.match(rf"{re.escape(value.__name__)}\([^\n]*\)\Z", doc):  # type: ignore[attr-defined]
            return inspect.cleandoc(doc)
    return ""


def _signature(value: object) -> str:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]  # what is not callable raises TypeError
    except Exception:  # no text signature, or one whose defaults cannot be evaluated
        return "()"
    names = [name for name in signature.parameters if name not in ("self", "cls")]
    return textwrap.shorten(f"({', '.join(names)})", 80, placeholder=" …)")


def _first_paragraphs(doc: str, name: str) -> str:
    """The first paragraphs on one line, without examples, rules and the signatures that old builtins begin with."""
    leaf = re.escape(name.rsplit(".", 1)[-1])
    own_signatures = re.compile(rf"(({leaf}|\w+\.{leaf})\([^)]*\)+( ?-> ?[\w ]+$| --)?\s*)+", re.MULTILINE)
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", own_signatures.sub("", doc, count=1) if own_signatures.match(doc) else doc):
        text = " ".join(block.split())
        if text and not text.startswith((">>>", "---", "===", "+--")):
            paragraphs.append(text)
        if len(paragraphs) == MAX_PARAGRAPHS:
            break
    return textwrap.shorten(" ".join(paragraphs).removeprefix("->"), MAX_TEXT_CHARACTERS, placeholder=" …")


def _module_of(name: str, kind: str) -> str:
    parts = {"module": 0, "class": 1, "function": 1, "method": 2}[kind]
    return name.rsplit(".", parts)[0] if parts and name.count(".") >= parts else (name if not parts else "builtins")


def main() -> None:
    """Print the corpus to standard output, one JSON object a line."""
    warnings.simplefilter("ignore")
    output = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(2, 1)  # what modules print while they are imported must not land in the corpus
    with output:
        for document in collect_documents():
            output.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
