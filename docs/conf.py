"""The documentation site: `sphinx-build -W docs site`, without a network."""

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, document, image
from latex2mathml.converter import convert

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import make_benchmarks  # noqa: E402

import pvl_adapter  # noqa: E402

make_benchmarks.main()

project = "pvl-adapter"
author = "the pvl-adapter maintainers"
copyright = f"2026, {author}"  # noqa: A001
version = release = pvl_adapter.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests run the notebooks; their outputs are in the files
nb_merge_streams = True

default_role = "py:obj"  # `name` is a link where there is such an object, and code where there is not
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"pvl-adapter {version}"
html_theme_options = {"footer_icons": []}
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["**/.ipynb_checkpoints"]
copybutton_exclude = ".linenos, .gp, .go"
html_math_renderer = "mathml"  # which browsers show by themselves: MathJax would be fetched from elsewhere


def setup(app: Any) -> None:
    """Equations as MathML; a click on a picture shows it at its own size."""

    def renderer(display: str) -> tuple[Any, None]:
        def visit(translator: Any, node: Any) -> None:
            translator.body.append(convert(node.astext(), display=display))
            raise SkipNode

        return visit, None

    def link_images(app: Any, tree: document, page: str) -> None:
        for each in tree.findall(image):
            each["width"] = "100%"  # so that Sphinx links it; static/site.css takes the width back

    app.add_html_math_renderer("mathml", renderer("inline"), renderer("block"))
    app.connect("doctree-resolved", link_images)
