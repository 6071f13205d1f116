"""Sphinx configuration: ``nox -s docs``."""

import gcx

project = "gcx"
author = "The gcx authors"
project_copyright = author
release = version = gcx.__version__
html_title = f"gcx {release}"
html_theme = "furo"
exclude_patterns = ["_build", "_generated"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# `gcx.name` in a docstring is a link, which must have a target; `name` is a parameter, or something
# of another library.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", r"(?!gcx\.).*")]

# The types stand in the numpydoc sections, in words; as text they need no index of other projects.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
