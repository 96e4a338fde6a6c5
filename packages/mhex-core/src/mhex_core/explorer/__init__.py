"""A page that shows explanations and lets a reader weigh them anew: one HTML file, no network, no server.

`mhex_vision` and `mhex_text` make its parts out of what they explain; everything before the min-max is linear in beta
and the layer weights, so the page carries each layer's evidence and adds it up itself.
"""

from mhex_core.explorer.page import ExplorerPage, explorer_page, notebook_frame
from mhex_core.explorer.parts import Evidence, Method, Picture, Piece, Sample

__all__ = [
    "Evidence",
    "ExplorerPage",
    "Method",
    "Picture",
    "Piece",
    "Sample",
    "explorer_page",
    "notebook_frame",
]
