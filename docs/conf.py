"""The documentation site, built by `make site`; a warning is an error there.

The source directory is the repository, so that a page, README and a notebook are the same file on the site and in the
clone, and a link means the same in both. `reference` writes the pages of the API when the site is built.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # This tree's tiltjax, whatever is installed.

project = "tiltjax"
author = "The tiltjax authors"
copyright = "2026, The tiltjax authors"  # noqa: A001

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "reference",
]
root_doc = "docs/index"
include_patterns = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = [
    ".*",
    "benchmarks",
    "build",
    "dist",
    "experiments",
    "runs",
    "tests",
    "tiltjax",
    "**/.ipynb_checkpoints",
]

# Every name in single backticks is a link; one that leads nowhere is an error, unless it belongs to another library.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"(jax|jit|jnp|numpy|optax|flax|pmap|shard_map|vmap|dataclasses|transformers|experiments)\b.*"),
]

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # Fields are described by their class, not indexed one by one.
napoleon_attr_annotations = False  # The signature has them.
napoleon_use_rtype = False
maximum_signature_line_length = 100
toc_object_entries = False
viewcode_follow_imported_members = True
python_display_short_literal_types = True

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
nb_execution_mode = "off"  # The tests run the notebooks.

html_theme = "furo"
html_title = "tiltjax"
html_static_path = ["static"]
html_css_files = ["site.css"]
smartquotes = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
