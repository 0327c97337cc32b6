"""Sphinx extension: the pages of the API, one a package, and what the strict build asks of them."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import pydoc
import re
import textwrap

from docutils import nodes
from docutils.utils import get_source_line
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

import tiltjax
from tiltjax.papers import PAPERS

FOLDER = "docs/api"
_log = logging.getLogger(__name__)
_ARXIV = re.compile(r"(?<![\"`'])\barXiv:([\w.-]+/\d{7}|\d{4}\.\d{4,5})\b(?![\"`'])")
_described: dict[
    tuple[int, str], str
] = {}  # (identity, name) of a public object -> the path that it is described under


def write_pages(app):
    """Writes docs/api: an index, and one page for every module in ``tiltjax.__all__``, and the papers."""
    packages = [name for name in tiltjax.__all__ if inspect.ismodule(getattr(tiltjax, name))]
    pages = {f"tiltjax.{name}.rst": "\n".join(_page(f"tiltjax.{name}")) for name in packages}
    entries = [f"   {name.removesuffix('.rst')}" for name in pages]
    index = [*_heading("API reference", "="), *_module(tiltjax), ".. autofunction:: tiltjax.citation", "",
             ".. toctree::", "   :hidden:", "", *entries, ""]  # fmt: skip
    pages["index.rst"] = "\n".join(index)
    pages["papers.rst"] = "\n".join(_papers())
    folder = pathlib.Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    for stale in folder.iterdir():
        if stale.name not in pages:
            stale.unlink()
    for name, text in pages.items():
        if not (path := folder / name).exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for name in packages:
        _check(f"tiltjax.{name}", app)


def _page(package):
    """What a package says of itself, and a section for each of its modules."""
    yield from _heading(package, "=")
    for module in _modules(package):
        if module.__name__ != package:
            yield from _heading(module.__name__.removeprefix(f"{package}."), "-")
        yield from _module(module)
        members = {name: list(_member(name, module, package)) for name in getattr(module, "__all__", ())}
        yield from [
            " · ".join(
                f"`{name} <{_described[id(getattr(module, name)), name]}>`" for name in members if members[name]
            ),
            "",
        ]
        for lines in members.values():
            yield from lines


def _modules(package):
    """A package and all that is in it."""
    yield (parent := importlib.import_module(package))
    for found in pkgutil.walk_packages(getattr(parent, "__path__", []), f"{package}."):
        yield importlib.import_module(found.name)


def _papers():
    """Every paper, and the functions whose docstrings name it."""
    yield from _heading("Papers", "=")
    yield from ["What the docstrings and the records of methods name, with what is after it here;",
                "`tiltjax.citation` gives the BibTeX of any.", ""]  # fmt: skip
    texts = {path: inspect.getdoc(pydoc.locate(path)) or "" for path in sorted(_described.values())}
    for paper in sorted(PAPERS.values(), key=lambda paper: (paper.year, paper.arxiv)):
        where = f"`arXiv:{paper.arxiv} <https://arxiv.org/abs/{paper.arxiv}>`__" if paper.arxiv else paper.venue
        found = [path for path, text in texts.items() if paper.arxiv and f"arXiv:{paper.arxiv}" in text]
        names = ", ".join(f"`{path.removeprefix('tiltjax.')} <{path}>`" for path in found)
        after = [f"  — {names}"] if found else []
        # Escaped, or "M. H." would begin an enumeration.
        yield f"* \\{'; '.join(paper.authors)}, {paper.year}. *{paper.title}.* {where}"
        yield from after


def _heading(text, line):
    return [text, line * len(text), ""]


def _module(module):
    return [f".. automodule:: {module.__name__}", "   :no-members:", ""]


def _member(name, module, package):
    """The directive that describes a public name of a module, or nothing for what another module defines."""
    value = getattr(module, name)
    home = _home(name, value, module, package)
    if _is_code(value):
        if value.__module__ != module.__name__:
            return
        kind = "class" if inspect.isclass(value) else "function"
        options = ["   :members:", "   :undoc-members:", "   :special-members: __call__"] if kind == "class" else []
        lines = [f".. auto{kind}:: {home}", *options]
    else:
        text = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
        if text is None:
            return
        place = [f"   :module: {home.rpartition('.')[0]}", f"   :canonical: {module.__name__}.{name}", ""]
        lines = [f".. py:data:: {name}", *place, *(f"   {line}" for line in text)]
    _described[id(value), name] = home
    yield from [*lines, ""]


def _is_code(value):
    return callable(value) and str(getattr(value, "__module__", "")).startswith("tiltjax")


def _home(name, value, module, package):
    """The shortest path of a public name: ``tiltjax.losses.dpo_loss`` for what its package has too."""
    parts = module.__name__.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(package.count("."), len(parts))]
    return next(f"{path}.{name}" for path in paths if getattr(importlib.import_module(path), name, None) is value)


def _check(package, app):
    """Every name that a module or a face makes public is described on some page."""
    for module in _modules(package):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            foreign = getattr(value, "__module__", "").partition(".")[0] == "jaxtyping"
            path = f"{module.__name__}.{name}"
            known = (id(value), name) in _described or path in app.config.undescribed
            if not (inspect.ismodule(value) or foreign or known):
                _log.warning("%s is public and has no description", path)


def read_docstring(app, what, name, obj, options, lines):
    """Links the papers. A public class, function or method without a docstring is a warning, an error of the build."""
    if what != "module":
        lines[:] = [_ARXIV.sub(r"`\g<0> <https://arxiv.org/abs/\1>`__", line) for line in lines]
    if what in ("class", "exception", "function", "method", "module", "property") and not any(map(str.strip, lines)):
        _log.warning("%s is public and has no docstring", name)


def skip_fields(app, what, name, obj, skip, options):
    """A field is described by its class; what a decorator of another library adds is not ours to describe."""
    code = getattr(obj, "fget", None) or getattr(obj, "__func__", obj)
    return None if _is_code(code) else True


def resolve(app, env, node, contnode):
    """A name in backticks by any of its paths, or by its last parts; that of a field leads to its class."""
    if node.get("refdomain") != "py" or node["reftype"] not in ("exc", "obj"):
        return None
    source, _ = get_source_line(node)
    here = (source or "").rpartition("docstring of ")[2].split(":")[0] or str(node.get("py:module"))
    target = node["reftarget"]
    path = _find(target, here) or _find(target.rpartition(".")[0], here)
    return path and env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)


def _find(target, here):
    """The path that a name is described under; of several, the one nearest to where it is named."""
    parent, _, name = target.rpartition(".")
    try:
        return _described.get((id(getattr(importlib.import_module(parent), name)), name))
    except (AttributeError, ImportError, ValueError):
        paths = [path for path in _described.values() if path.endswith(f".{target}")]
        near = [sum(a == b for a, b in zip(path.split("."), here.split("."), strict=False)) for path in paths]
        return paths[near.index(max(near))] if near.count(max(near, default=0)) == 1 else None


def sign(app, what, name, obj, options, signature, returns):
    """The signature as it is written: ``Numeric``, and not the union that it stands for."""
    if what not in ("class", "function", "method"):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    links = _Links(vars(importlib.import_module(obj.__module__)))
    bound = what == "method" and not isinstance(inspect.getattr_static(*_parent(name)), staticmethod)
    if isinstance(node, ast.ClassDef):
        makers = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        if not makers:
            return (f"({', '.join(_fields(node, obj, links))})", None) if "__annotations__" in vars(obj) else None
        node, bound = makers[0], True
    if not isinstance(node, ast.FunctionDef):
        return None
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg) and argument.annotation:
            argument.annotation = links.visit(argument.annotation)
    if bound:
        del (node.args.posonlyargs or node.args.args)[0]
    return f"({ast.unparse(node.args)})", node.returns and ast.unparse(links.visit(node.returns))


def _parent(name):
    path, _, last = name.rpartition(".")
    return pydoc.locate(path), last


def _fields(node, cls, links):
    """What a dataclass or a named tuple is made from."""
    annotations = {child.target.id: child.annotation for child in node.body if isinstance(child, ast.AnnAssign)}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in annotations:
            text = f"{name}: {ast.unparse(links.visit(annotations[name]))}"
            plain = isinstance(parameter.default, bool | int | float | str | tuple | None)
            default = repr(parameter.default) if plain else "..."
            yield text if parameter.default is parameter.empty else f"{text} = {default}"


class _Links(ast.NodeTransformer):
    """Types of the library by their whole path: Sphinx makes them links, and shows the last part."""

    def __init__(self, scope):
        self.scope = scope

    def visit_Name(self, node):
        return self._link(node, self.scope.get(node.id), node.id)

    def visit_Attribute(self, node):
        owner = self.scope.get(node.value.id) if isinstance(node.value, ast.Name) else None
        return self._link(node, getattr(owner, node.attr, None), node.attr)

    def visit_Constant(self, node):
        return self._link(node, self.scope.get(node.value), node.value)

    def _link(self, node, value, name):
        path = _described.get((id(value), name))
        return ast.UnaryOp(ast.Invert(), ast.Name(path)) if path else node


def tidy(app, doctree):
    """In annotations only names of the library are links; looking for the others would take half of the time."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node["reftype"] == "class" and not node["reftarget"].startswith("tiltjax."):
            node.replace_self(node.children)
    for node in list(doctree.findall(nodes.Text)):
        if node == " -- ":  # Between a parameter and what is said of it.
            node.parent.replace(node, nodes.Text(" – "))


def link_sources(app, doctree):
    """A link of a page to a module's file goes to what the reference says of the module."""
    for node in list(doctree.findall(addnodes.download_reference)):
        if match := re.fullmatch(r"(?:\.\./)*(tiltjax/.*)\.py", node["reftarget"]):
            target = match[1].removesuffix("/__init__").replace("/", ".")
            link = addnodes.pending_xref("", refdomain="py", reftype="mod", reftarget=target, refexplicit=True,
                                         refdoc=app.env.docname)  # fmt: skip
            link += nodes.inline("", "", *node.children)
            node.replace_self(link)


def setup(app):
    """Called by Sphinx."""
    app.add_config_value("undescribed", [], "env")
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", tidy)
    app.connect("doctree-read", link_sources)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
