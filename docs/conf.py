"""How the documentation is built: `nox -s docs`. No network is needed, and every warning is an error there."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "MHEX"
author = "the authors of MHEX"
release = importlib.metadata.version("mhex-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "public_names"]
exclude_patterns = ["_build", "_extensions"]

html_theme = "furo"
html_title = f"MHEX {release}"
html_copy_source = False
html_show_copyright = False
smartquotes = False  # "--" in a sentence is an option
html_theme_options = {"navigation_with_keys": True}
html_static_path: list[str] = []
# One mark of the block's language is enough: commands are copied without it, and without what they print.
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Names of shells and file formats that need no colours.
highlight_language = "text"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
# What stands between single backticks in a docstring: a name of ours, which becomes a link, or code.
default_role = "py:obj"

nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    # Names that only a type checker imports stay as they are written.
    ("py:class", r"Tensor|Path|Figure|Autocast|ImageSet|Resolution|Storage|M|.*\.sanity\.M"),
    # What a method that is not for users returns or takes.
    ("py:class", r"mhex_\w+\.(bulk|comparison|vit)\.\w+\.\w+"),
    # Other projects' names: their inventories would have to be fetched.
    (
        "py:.*",
        r"(accelerate|collections|datasets|huggingface_hub|matplotlib|numpy|np|npt|nn|os|pathlib|pa|pyarrow)\..*",
    ),
    ("py:.*", r"(PIL|tokenizers|torch|torchmetrics|torchvision|transformers|typing|types|abc)\..*"),
]
