"""Sphinx configuration: ``nox -s docs``."""

from html import escape

import latex2mathml.converter
from docutils import nodes
from sphinx.util.math import get_node_equation_number

import gcx

project = "gcx"
author = "The gcx authors"
project_copyright = author
release = version = gcx.__version__
html_title = f"gcx {release}"
html_theme = "furo"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["gcx.css"]
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"picture-scheme": "light", "filter-of-white": "none"},
    "dark_css_variables": {
        "picture-scheme": "dark",
        "filter-of-white": "invert(0.91) hue-rotate(180deg)",
    },
}
pygments_dark_style = "a11y-dark"
html_math_renderer = "mathml"
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


def setup(app):
    """Write formulas as MathML, label the cells of tables, and mark pictures for the dark mode."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display, None))
    app.connect("doctree-resolved", label_cells)
    app.connect("doctree-resolved", mark_white_pictures)


def visit_math(translator, node):
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_display(translator, node):
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(mathml(node, "block") + "</div>\n")
    raise nodes.SkipNode


def mathml(node, display):
    latex = node.astext().replace(r"\lVert", r"\left\Vert").replace(r"\rVert", r"\right\Vert")
    if r"\\" in latex:
        latex = rf"\begin{{align}}{latex}\end{{align}}"
    return latex2mathml.converter.convert(latex, display=display)


def label_cells(_app, document, _name):
    """Repeat the header of a table in its cells, for gcx.css to show on a phone."""
    for table in document.findall(nodes.table):
        header, *rows = table.findall(nodes.row)
        if len(header) > 7:
            table["classes"].append("wide")
        for cell, title in ((c, h) for row in rows for c, h in zip(row, header, strict=True)):
            if title.astext() and cell.astext():
                label = f'<span class="label" data-title="{escape(title.astext())}"></span>'
                cell.insert(0, nodes.raw("", label, format="html"))


def mark_white_pictures(_app, document, _name):
    """Let gcx.css find the study's pictures, which matplotlib draws on white."""
    for image in document.findall(nodes.image):
        if image["uri"].startswith("_generated/paper/"):
            image["classes"].append("on-white")
